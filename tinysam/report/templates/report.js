"use strict";
// The page is complete without this: it only enlarges pictures, and hides masks in browsers without :has().
const dialog = document.getElementById("enlarged");
for (const picture of document.querySelectorAll(".picture")) {
  const frame = picture.querySelector(".frame");
  if (!frame.querySelector("img")) continue;
  frame.tabIndex = 0;
  frame.setAttribute("role", "button");
  const open = () => {
    const copy = frame.cloneNode(true);
    copy.removeAttribute("role");
    copy.removeAttribute("tabindex");
    dialog.style.setProperty("--ratio", picture.style.getPropertyValue("--ratio"));
    dialog.firstElementChild.replaceWith(copy);
    dialog.lastElementChild.textContent = picture.querySelector("figcaption").innerText.replace(/\s+/g, " ");
    dialog.showModal();
  };
  frame.addEventListener("click", open);
  frame.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(); }
  });
}
dialog.addEventListener("click", () => dialog.close());
const masks = document.getElementById("show-masks");
if (masks) masks.addEventListener("change", () => document.body.classList.toggle("bare", !masks.checked));
