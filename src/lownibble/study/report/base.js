// What the pages share: closed parts open for printing, a tip beside a figure, and reading a figure by pointer or keys.
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

  return { all, showTip, attach };
})();
