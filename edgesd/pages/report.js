"use strict";
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  if (!heads.some(head => head.hasAttribute("aria-sort"))) continue;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    const key = row => row.cells[column].dataset.order ?? row.cells[column].textContent;
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const down = before ? before === "ascending" : head.classList.contains("number");
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const compare = (a, b) =>
        key(a).localeCompare(key(b), undefined, { numeric: true });
      const byNumber = (a, b) => key(a) - key(b);
      const numeric = table.tBodies[0].rows[0]?.cells[column].dataset.order !== undefined;
      const rows = [...table.tBodies[0].rows].sort(numeric ? byNumber : compare);
      table.tBodies[0].append(...(down ? rows.reverse() : rows));
    });
  });
}
for (const pair of document.querySelectorAll(".pair")) {
  const source = pair.querySelector(".source img"), ours = pair.querySelector(".ours img");
  if (!source || !ours) continue;
  const caption = ours.nextElementSibling, own = ours.src, alt = ours.alt;
  const button = document.createElement("button");
  button.className = "flip";
  button.type = "button";
  button.textContent = "Show the source in place of ours";
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => {
    const pressed = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(pressed));
    ours.src = pressed ? source.src : own;
    ours.alt = pressed ? source.alt : alt;
    caption.textContent = pressed ? "source, for comparison" : "ours";
  });
  pair.after(button);
}
