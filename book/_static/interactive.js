// Sliders of the book's figures: swap the parts of an inline SVG that move. See geodesic.plots.interactive.
document.addEventListener("DOMContentLoaded", () => {
  for (const picture of document.querySelectorAll("[data-interactive]")) {
    const { gids, frames, texts } = JSON.parse(picture.querySelector("script").textContent);
    const svg = picture.querySelector("svg");
    const groups = gids.map((gid) => svg.querySelector(`[id="${gid}"]`));
    const input = picture.querySelector("input");
    const output = picture.querySelector("output");
    input.addEventListener("input", () => {
      const stop = Number(input.value);
      groups.forEach((group, i) => { group.innerHTML = frames[stop][i]; });
      input.setAttribute("aria-valuetext", texts[stop]);
      svg.setAttribute("aria-label", texts[stop]);
      output.textContent = texts[stop];
    });
  }
});
