
"use strict";
// Filter and sort of the tables of predictions. Everything else on the page works without.
for (const place of document.querySelectorAll(".predictions")) {
  const form = place.querySelector("form");
  const table = place.querySelector("table");
  const count = place.querySelector(".count");
  const shown = Number(place.dataset.shown);
  const rows = [...table.tBodies].flatMap((body) => [...body.rows]);
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  let order = rows.slice();

  const fits = {
    "": () => true,
    x: (row) => "differs" in row.dataset,
    m: (row) => row.dataset.marks.includes("0") && row.dataset.marks.includes("1"),
    n: (row) => row.dataset.marks.includes("0") && !row.dataset.marks.includes("1"),
    w: (row, one) => row.dataset.marks[one] === "0",
    r: (row, one, other) => row.dataset.marks[one] === "1" && row.dataset.marks[other] === "0",
  };

  function apply() {
    const [kind, ...arms] = form.elements.choice.value.split(":");
    const seed = form.elements.seed.value;
    const part = form.elements.part ? form.elements.part.value : "";
    const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const kept = [];
    const left = [];
    for (const row of order) {
      const keep = fits[kind](row, ...arms)
        && (seed === "" || row.dataset.seed === seed)
        && (part === "" || row.dataset.part === part)
        && words.every((word) => texts.get(row).includes(word));
      row.hidden = !keep;
      (keep ? kept : left).push(row);
    }
    // the first body is what is printed
    table.tBodies[0].append(...kept.slice(0, shown));
    table.tBodies[1].append(...kept.slice(shown), ...left);
    count.textContent = `${kept.length} of ${rows.length} rows`;
  }

  function value(row, column, number) {
    const cell = row.cells[column];
    const given = cell.dataset.v ?? cell.textContent.trim();
    return number ? Number(given.replace(/^\D*(?=[\d.-])/, "")) : given.toLowerCase();
  }

  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    if (head.dataset.what) button.title = `Sort ${head.dataset.what}`;
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const number = head.dataset.sort === "number";
      const values = new Map(rows.map((row) => [row, value(row, head.cellIndex, number)]));
      const sign = down ? -1 : 1;
      order = rows.slice().sort((one, other) => {
        const a = values.get(one);
        const b = values.get(other);
        return sign * (a < b ? -1 : a > b ? 1 : 0);
      });
      apply();
    });
  }

  form.addEventListener("input", apply);
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    for (const field of form.elements) if (field.name) field.value = "";
    apply();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
}
