"use strict";

// Without scripts there is nothing to press: buttons appear here.
for (const button of document.querySelectorAll("button.copy")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const source = button.parentElement.querySelector("code");
    let done = true;
    try {
      await navigator.clipboard.writeText(source.textContent);
    } catch {
      // Some browsers give pages from disk no clipboard; a selection can be copied anywhere.
      getSelection().selectAllChildren(source);
      done = document.execCommand("copy");
    }
    button.textContent = done ? "Copied" : "Selected";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

// What has no value stays below, whichever way the rest is sorted.
const value = (row, column) => row.cells[column]?.dataset.value;
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const falling = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const known = [...body.rows].filter((row) => value(row, column) !== undefined);
      const order = new Intl.Collator("en", { numeric: true });
      known.sort((a, b) => {
        const [x, y] = [value(a, column), value(b, column)];
        const by = isNaN(x) || isNaN(y) ? order.compare(x, y) : x - y;
        return falling ? -by : by;
      });
      body.prepend(...known);
    });
  });
}
