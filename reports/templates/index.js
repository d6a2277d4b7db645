"use strict";
const form = document.querySelector(".filters");
const shown = form.querySelector("output");
const rows = Array.from(document.querySelectorAll(".reports li"), (row) => ({
  row,
  kind: row.dataset.kind,
  disposition: row.dataset.disposition,
  types: row.dataset.types.split(" "),
  text: row.textContent.toLowerCase(),
}));
const empty = document.querySelector(".empty");
function filter() {
  const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
  const { kind, disposition, type } = Object.fromEntries(
    ["kind", "disposition", "type"].map((name) => [name, form.elements[name].value]));
  let count = 0;
  for (const r of rows) {
    const keep = (!kind || r.kind === kind) && (!disposition || r.disposition === disposition)
      && (!type || r.types.includes(type)) && words.every((word) => r.text.includes(word));
    r.row.hidden = !keep;
    count += keep;
  }
  shown.value = `${count.toLocaleString("en")} of ${rows.length.toLocaleString("en")} reports shown`;
  empty.hidden = count > 0 || rows.length === 0;
}
let timer;
form.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(filter, 80); });
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(filter));
form.hidden = false;
filter();
