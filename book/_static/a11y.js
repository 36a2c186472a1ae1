// Repairs what the theme and the bibliography extension leave unreadable for screen readers.
document.addEventListener("DOMContentLoaded", () => {
  for (const control of document.querySelectorAll("button[aria-label], summary[aria-label]")) {
    if (control.textContent.trim()) control.removeAttribute("aria-label");
  }
  const sidebar = document.querySelector("#pst-primary-sidebar");
  if (sidebar) { sidebar.setAttribute("role", "complementary"); sidebar.setAttribute("aria-label", "Book"); }
  for (const entry of document.querySelectorAll(".citation-list > .citation")) entry.setAttribute("role", "listitem");
  for (const picture of document.querySelectorAll(".picture")) {
    if (picture.scrollWidth > picture.clientWidth) picture.tabIndex = 0;
  }
});
