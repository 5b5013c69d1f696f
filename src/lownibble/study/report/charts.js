// Moves what the page has drawn: another x axis, another loss scale, methods on and off; reads values out under pointer and keys.
// Nothing is fetched and no markup is made from data: names and figures only ever become text.
(() => {
  const { all, showTip, attach, saving } = page;

  for (const figure of all(document, ".bar")) {
    const bar = figure.querySelector("svg"), segments = all(bar, ".segment");
    let picked = -1;
    all(bar, "title").forEach((title) => title.remove());
    const pick = (index) => {
      picked = index;
      segments.forEach((s, i) => s.classList.toggle("picked", i === index));
      const box = segments[index].getBoundingClientRect(), frame = figure.getBoundingClientRect();
      showTip(figure, segments[index].dataset.text, box.left + box.width / 2 - frame.left, box.top - frame.top);
    };
    const gap = (s, x) => { const box = s.getBoundingClientRect(); return Math.max(box.left - x, x - box.right, 0); };
    attach(figure, bar, {
      at: (x) => pick(segments.map((s, i) => [gap(s, x), i]).reduce((a, b) => (b[0] < a[0] ? b : a))[1]),
      move: (by) => pick(Math.max(0, Math.min(segments.length - 1, picked + by))),
      leave: () => { picked = -1; segments.forEach((s) => s.classList.remove("picked")); figure.querySelector(".tip").hidden = true; },
    });
  }

  const data = document.getElementById("curves");
  const drawn = data ? JSON.parse(data.textContent) : null;
  if (drawn) drawCurves(drawn);
  saving((figure) => () => [["method", "series", "step", "seconds", "tokens", "value", "error"], ...drawn.panels[figure.dataset.panel].series.flatMap((s) => {
    const at = drawn.tracks[s.method][s.track];
    return s.y.map((y, i) => [drawn.methods[s.method], s.label, at.steps[i], at.seconds[i], at.tokens[i], y, s.error ? s.error[i] : ""]).filter((row) => row[5] !== null);
  })]);
  document.documentElement.dataset.charts = "ready";

  function drawCurves(drawn) {
    const boxes = all(document, "[data-method]"), hidden = new Set();
    const view = { x: "steps", y: drawn.panels.some((p) => p.scale === "log") ? "log" : "linear" };
    const share = (a, v) => (a.log ? Math.log(v / a.lo) / Math.log(a.hi / a.lo) : (v - a.lo) / (a.hi - a.lo));
    const percent = (v) => `${(100 * v).toFixed(2)}%`;
    const number = (v, digits = 4) => v.toLocaleString("en", { maximumSignificantDigits: digits });
    const panels = all(document, ".panel").map((figure) => makePanel(figure, drawn.panels[figure.dataset.panel]));

    function make(parent, name, attributes, text) {
      const element = document.createElementNS(parent.namespaceURI, name);
      for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
      if (text !== undefined) element.textContent = text;
      parent.append(element);
    }

    function makePanel(figure, panel) {
      const plot = figure.querySelector(".plot"), area = figure.querySelector(".area"), cross = figure.querySelector(".cross");
      const groups = all(area, "[data-series]");
      const yAxis = () => panel.scales[view.y] || panel.scales.linear;
      const xs = (series) => drawn.tracks[series.method][series.track][view.x];
      const shown = () => panel.series.filter((s) => !hidden.has(s.method));
      let picked = null;

      function draw() {
        const x = drawn.x[view.x], y = yAxis();
        const [gridY, gridX] = [area.querySelector(".grid.y"), area.querySelector(".grid.x")];
        gridY.replaceChildren();
        gridX.replaceChildren();
        for (const [value, text] of y.ticks) {
          const at = percent(1 - share(y, value));
          make(gridY, "line", { x1: 0, x2: "100%", y1: at, y2: at });
          make(gridY, "text", { x: -8, y: at, dy: ".32em" }, text);
        }
        for (const [value, text] of x.ticks) make(gridX, "text", { x: percent(share(x, value)), y: "100%", dy: "1.6em" }, text);
        for (const group of groups) {
          const series = panel.series[group.dataset.series], across = xs(series);
          group.classList.toggle("away", hidden.has(series.method));
          const left = (i) => percent(share(x, across[i])), up = (v) => percent(1 - share(y, v));
          for (const path of all(group, "path")) {
            let pen = "M";
            path.setAttribute("d", series.y.map((v, i) => {
              if (v === null) { pen = "M"; return ""; }
              const point = `${pen}${(1000 * share(x, across[i])).toFixed(1)} ${(1000 - 1000 * share(y, v)).toFixed(1)}`;
              pen = "L";
              return point;
            }).join(""));
          }
          for (const mark of all(group, "use")) {
            mark.setAttribute("x", left(mark.dataset.i));
            mark.setAttribute("y", up(series.y[mark.dataset.i]));
          }
          for (const bar of all(group, "line")) {
            const i = bar.dataset.i, ends = { x1: left(i), x2: left(i), y1: up(series.y[i] - series.error[i]), y2: up(series.y[i] + series.error[i]) };
            for (const [key, value] of Object.entries(ends)) bar.setAttribute(key, value);
          }
        }
        const target = area.querySelector(".target");
        if (target) ["y1", "y2"].forEach((end) => target.setAttribute(end, percent(1 - share(y, panel.target))));
        figure.querySelector(".axis").textContent = x.title;
        figure.querySelector(".scale").textContent = y.log ? "log scale" : "";
        leave();
      }

      function nearest(series, value) {
        let best = -1;
        xs(series).forEach((x, i) => {
          if (series.y[i] !== null && (best < 0 || Math.abs(x - value) < Math.abs(xs(series)[best] - value))) best = i;
        });
        return best;
      }

      function read(value) {
        const lines = new Map();
        let at = null;
        for (const series of shown()) {
          const i = nearest(series, value);
          if (i < 0) continue;
          const x = xs(series)[i];
          if (at === null || Math.abs(x - value) < Math.abs(at - value)) at = x;
          const error = series.error ? ` ± ${number(series.error[i], 2)}` : "";
          const found = { i, x, step: drawn.tracks[series.method][series.track].steps[i], text: `${series.label} ${number(series.y[i])}${error}` };
          lines.set(series.method, [...(lines.get(series.method) || []), found]);
        }
        if (at === null) return;
        picked = at;
        const text = [...lines].map(([method, found]) => {
          const close = found.reduce((a, b) => (Math.abs(b.x - value) < Math.abs(a.x - value) ? b : a));
          const where = view.x === "steps" ? `step ${close.step}` : `step ${close.step} (${number(close.x)} ${view.x})`;
          return `${drawn.methods[method]}, ${where}: ${found.filter((f) => f.i === close.i).map((f) => f.text).join(", ")}`;
        }).join("\n");
        const left = percent(share(drawn.x[view.x], at));
        cross.setAttribute("x1", left);
        cross.setAttribute("x2", left);
        cross.setAttribute("visibility", "visible");
        const frame = figure.getBoundingClientRect(), box = area.getBoundingClientRect();
        showTip(figure, text, box.left - frame.left + share(drawn.x[view.x], at) * box.width, box.top - frame.top);
      }

      function leave() {
        picked = null;
        cross.setAttribute("visibility", "hidden");
        figure.querySelector(".tip").hidden = true;
      }

      attach(figure, plot, {
        at(clientX) {
          const box = area.getBoundingClientRect(), x = drawn.x[view.x];
          read(x.lo + Math.max(0, Math.min(1, (clientX - box.left) / box.width)) * (x.hi - x.lo));
        },
        move(by) {
          const stops = [...new Set(shown().flatMap((s) => xs(s).filter((_, i) => s.y[i] !== null)))].sort((a, b) => a - b);
          if (!stops.length) return;
          const index = picked === null ? (by > 0 ? -1 : stops.length) : stops.indexOf(picked);
          read(stops[Math.max(0, Math.min(stops.length - 1, index + by))]);
        },
        leave,
      });
      return draw;
    }

    const draw = () => panels.forEach((one) => one());
    for (const name of ["x", "y"]) {
      for (const input of all(document, `input[name=${name}]`)) {
        input.checked = input.value === view[name];
        input.addEventListener("change", () => { view[name] = input.value; draw(); });
      }
    }
    for (const box of boxes) {
      box.checked = true;
      box.addEventListener("change", () => {
        if (box.checked) hidden.delete(Number(box.dataset.method));
        else hidden.add(Number(box.dataset.method));
        draw();
      });
    }
    draw();
  }
})();
