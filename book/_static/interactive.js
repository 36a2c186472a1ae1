// Sliders of the book's figures: set the attributes of an inline SVG that move. See geodesic.plots.interactive.
document.addEventListener("DOMContentLoaded", () => {
  for (const picture of document.querySelectorAll("[data-interactive]")) {
    const { parts, frames, texts } = JSON.parse(picture.querySelector("script").textContent);
    const svg = picture.querySelector("svg");
    const elements = parts.map(([gid, place, attribute]) => {
      const group = svg.querySelector(`[id="${gid}"]`);
      return attribute ? group.querySelectorAll("*")[place] : group;
    });
    const inputs = [...picture.querySelectorAll("input")];
    const output = picture.querySelector("output");
    const show = () => {
      // The last slider turns fastest.
      const frame = inputs.reduce((k, input) => k * (Number(input.max) + 1) + Number(input.value), 0);
      elements.forEach((element, i) => {
        if (parts[i][2]) element.setAttribute(parts[i][2], frames[frame][i]);
        else element.innerHTML = frames[frame][i];
      });
      for (const input of inputs) input.setAttribute("aria-valuetext", texts[frame]);
      svg.setAttribute("aria-label", texts[frame]);
      output.textContent = texts[frame];
    };
    for (const input of inputs) input.addEventListener("input", show);
  }
});
