// What the pages share: closed parts open for printing, a tip beside a figure, reading a figure by pointer or keys, and saving
// figures (SVG) and tables (CSV).
"use strict";
const page = (() => {
  document.documentElement.classList.add("script");
  const all = (where, what) => [...where.querySelectorAll(what)];

  const closed = [];
  addEventListener("beforeprint", () => closed.push(...all(document, "details:not([open])").map((d) => { d.open = true; return d; })));
  addEventListener("afterprint", () => closed.splice(0).forEach((d) => { d.open = false; }));

  // Shows a figure's tip above `y`, so that it covers no value.
  function showTip(figure, text, x, y) {
    const tip = figure.querySelector(".tip");
    if (tip.textContent !== text) tip.textContent = text;
    tip.hidden = false;
    tip.style.left = `${Math.max(0, Math.min(x - tip.offsetWidth / 2, figure.clientWidth - tip.offsetWidth))}px`;
    tip.style.top = `${y - tip.offsetHeight - 4}px`;
  }

  // A reader of one figure: `at(x)` and `move(by)` pick a value, `leave()` lets go of it.
  function attach(figure, target, reader) {
    target.tabIndex = 0;
    const follow = (event) => reader.at(event.clientX);
    target.addEventListener("pointermove", follow);
    target.addEventListener("pointerdown", follow);
    target.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") reader.leave(); });
    target.addEventListener("blur", reader.leave);
    target.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (by) reader.move(by);
      else if (event.key === "Escape") reader.leave();
      else return;
      event.preventDefault();
    });
    document.addEventListener("pointerdown", (event) => { if (!figure.contains(event.target)) reader.leave(); });
  }

  function save(title, type, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = `${title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "")}.${type === "text/csv" ? "csv" : "svg"}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  // Text that a spreadsheet would take for a formula begins with a quote.
  const field = (v) => {
    const text = typeof v === "number" ? String(v) : String(v ?? "").replace(/^(?=[=@]|[+-][^\d.\s])/, "'");
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const csv = (rows) => rows.map((row) => row.map(field).join(",") + "\r\n").join("");

  // A plot as a file of its own: as it is on the page, in light colours, with title, names of the methods and the page's style.
  function svg(figure) {
    const [plot, area] = [".plot", ".area"].map((name) => figure.querySelector(name)), space = area.namespaceURI;
    const outer = plot.getBoundingClientRect(), box = area.getBoundingClientRect(), top = 52;
    const make = (parent, name, attributes, text) => {
      const element = document.createElementNS(space, name);
      for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
      if (text !== undefined) element.textContent = text;
      return parent.appendChild(element);
    };
    const root = document.createElementNS(space, "svg"), height = outer.height + top + 18;
    for (const [key, value] of Object.entries({ width: outer.width, height, viewBox: `0 0 ${outer.width} ${height}` })) root.setAttribute(key, value);
    const style = document.querySelector("style").textContent.replace(/@media screen and \(prefers-color-scheme: dark\)/g, "@media not all");
    make(root, "style", {}, `${style} svg { font-family: sans-serif; }`);
    root.append(document.querySelector(".defs defs").cloneNode(true));
    make(root, "rect", { width: "100%", height: "100%", fill: "#fff" });
    make(root, "text", { x: 8, y: 18, "font-weight": 600 }, figure.querySelector("h3").textContent.trim());
    let x = 8;
    for (const swatch of all(document, ".methods .swatch")) {
      const label = swatch.closest("label"), key = swatch.cloneNode(true), input = label.querySelector("input");
      if (input && !input.checked) continue;
      for (const [name, value] of Object.entries({ x, y: 28 })) key.setAttribute(name, value);
      root.append(key);
      x += 36 + make(root, "text", { x: x + 36, y: 38, "font-size": 12 }, label.textContent.trim()).textContent.length * 7 + 14;
    }
    const copy = area.cloneNode(true);
    for (const [key, value] of Object.entries({ x: box.left - outer.left, y: box.top - outer.top + top, width: box.width, height: box.height })) copy.setAttribute(key, value);
    all(copy, ".cross, .away").forEach((element) => element.remove());
    root.append(copy);
    const axis = figure.querySelector(".axis");
    if (axis) make(root, "text", { x: box.left - outer.left + box.width / 2, y: height - 6, "text-anchor": "middle", "font-size": 12 }, axis.textContent);
    return new XMLSerializer().serializeToString(root);
  }

  function buttons(after, title, kinds) {
    const line = document.createElement("p");
    line.className = "save";
    for (const [kind, type, text] of kinds) {
      const button = line.appendChild(document.createElement("button"));
      button.type = "button";
      button.textContent = kind;
      button.setAttribute("aria-label", `Save ${title} as ${kind}`);
      button.addEventListener("click", () => save(title, type, text()));
    }
    after.after(line);
  }

  // The texts of a table by row and column. Lists are read whole, closed or not; below a cell of several rows the others are empty.
  function cells(table) {
    const rows = all(table, "tr"), found = rows.map(() => []);
    rows.forEach((row, place) => {
      for (const cell of row.cells) {
        const lines = all(cell, "li").map((line) => line.textContent), text = lines.length ? lines.join("; ") : cell.innerText;
        let column = 0;
        while (column in found[place]) column += 1;
        for (let below = 0; below < cell.rowSpan; below += 1) found[place + below][column] = below ? "" : text.replace(/\s+/g, " ").trim();
      }
    });
    return found;
  }

  // The buttons under every table, and under every plot; `rows(figure)`: the plot's values with a head.
  function saving(rows) {
    for (const table of all(document, ".wide > table")) {
      buttons(table.parentElement, table.getAttribute("aria-label"), [["CSV", "text/csv", () => csv(cells(table))]]);
    }
    for (const figure of all(document, ".panel")) {
      const found = rows(figure), kinds = [["SVG", "image/svg+xml", () => svg(figure)]];
      if (found) kinds.push(["CSV", "text/csv", () => csv(found())]);
      buttons(figure.lastElementChild, figure.querySelector("h3").textContent.trim(), kinds);
    }
  }

  return { all, showTip, attach, saving };
})();
