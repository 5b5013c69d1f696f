// Moves what the page has drawn: methods on and off; reads evaluation losses out under pointer and keys. Nothing is fetched.
(() => {
  const { all, showTip, attach, saving } = page;
  const panels = JSON.parse(document.getElementById("panels").textContent);

  for (const box of all(document, "[data-method]")) {
    box.checked = true;
    box.addEventListener("change", () => {
      all(document, `[data-of="${box.dataset.method}"]`).forEach((curve) => curve.classList.toggle("away", !box.checked));
    });
  }

  for (const figure of all(document, "[data-panel]")) {
    const { lo, hi, readings } = panels[figure.dataset.panel];
    const area = figure.querySelector(".area"), cross = figure.querySelector(".cross");
    let picked = -1;
    const pick = (index) => {
      picked = index;
      const [step, text] = readings[index], share = (step - lo) / (hi - lo);
      for (const end of ["x1", "x2"]) cross.setAttribute(end, `${(100 * share).toFixed(2)}%`);
      cross.setAttribute("visibility", "visible");
      const frame = figure.getBoundingClientRect(), box = area.getBoundingClientRect();
      showTip(figure, text, box.left - frame.left + share * box.width, box.top - frame.top);
    };
    attach(figure, figure.querySelector(".plot"), {
      at(clientX) {
        const box = area.getBoundingClientRect(), step = lo + ((clientX - box.left) / box.width) * (hi - lo);
        pick(readings.map(([at], i) => [Math.abs(at - step), i]).reduce((a, b) => (b[0] < a[0] ? b : a))[1]);
      },
      move: (by) => pick(picked < 0 ? (by > 0 ? 0 : readings.length - 1) : Math.max(0, Math.min(readings.length - 1, picked + by))),
      leave() { picked = -1; cross.setAttribute("visibility", "hidden"); figure.querySelector(".tip").hidden = true; },
    });
  }
  saving((figure) => ("panel" in figure.dataset ? () => panels[figure.dataset.panel].rows : null));
  document.documentElement.dataset.charts = "ready";
})();
