"use strict";
// Sorting: numbers by their full value (data-v), text by its letters; undefined ones stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const numbers = [...table.tBodies[0].rows].some((row) => row.cells[column].dataset.v);
      const before = head.getAttribute("aria-sort");
      const down = before === "none" ? numbers : before === "ascending";
      const key = (row) => {
        const cell = row.cells[column];
        if (!numbers) return cell.textContent.trim().toLowerCase();
        return cell.dataset.v ? Number(cell.dataset.v) : null;
      };
      const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        const order = numbers ? a - b : a.localeCompare(b);
        return down ? -order : order;
      });
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  });
}
// A link into something folded opens it, and paper shows everything.
const unfold = () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const box = target && target.closest("details");
  if (box && !box.open) { box.open = true; target.scrollIntoView(); }
};
addEventListener("hashchange", unfold);
unfold();
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open]):not(.screen)")];
  closed.forEach((box) => { box.open = true; });
});
addEventListener("afterprint", () => closed.forEach((box) => { box.open = false; }));
