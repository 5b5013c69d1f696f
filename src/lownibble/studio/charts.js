// Line charts in SVG: axes, a legend that differs in dashes too, not in colour alone, and values read out under the pointer and by arrow keys.
// Names and figures only ever become text.
"use strict";
const charts = (() => {
  const NS = "http://www.w3.org/2000/svg", DASHES = ["", "7 4", "2 3", "10 3 2 3", "4 2"];
  const make = (parent, name, attributes = {}, text) => {
    const made = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  };

  // At most `count` round numbers between low and high.
  function ticks(low, high, count) {
    const raw = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(raw || 1));
    const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= raw) || power;
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
    return found;
  }

  const short = (value) => value.toLocaleString("en", { maximumSignificantDigits: 4, notation: Math.abs(value) >= 1e5 ? "compact" : "standard" });
  const plain = (x) => x.toLocaleString("en", { maximumFractionDigits: 1 });

  // figure: an element. chart: { title, x: word, unit, series: [{ name, x, y, dots }], band: [low, high, words], zero, format, colours }
  function draw(figure, chart) {
    const format = chart.format || short, series = chart.series.filter((one) => one.x.length);
    const width = Math.max(240, figure.clientWidth || 480), height = 232, left = 52, right = 14, top = 12, bottom = 42;
    const picked = figure.dataset.at === undefined ? null : Number(figure.dataset.at);
    let body = figure.querySelector("svg");
    if (!body) {
      figure.classList.add("chart");
      const caption = document.createElement("figcaption");
      body = make(figure, "svg", { tabindex: 0, role: "img" });
      figure.prepend(caption);
      const tip = document.createElement("p");
      tip.className = "tip"; tip.setAttribute("role", "status");
      figure.append(tip);
      listen(figure, body);
    }
    const caption = figure.querySelector("figcaption");
    caption.replaceChildren(Object.assign(document.createElement("b"), { textContent: chart.title }));
    if (chart.note) caption.append(` ${chart.note}`);
    body.replaceChildren();
    body.setAttribute("viewBox", `0 0 ${width} ${height}`);
    body.setAttribute("height", height);
    const xs = series.flatMap((one) => [one.x[0], one.x.at(-1)]), ys = series.flatMap((one) => one.y.filter((v) => v !== null));
    if (!ys.length) {
      make(body, "text", { x: width / 2, y: height / 2, "text-anchor": "middle", class: "none" }, "nothing yet");
      body.setAttribute("aria-label", `${chart.title}: nothing yet`);
      figure.reader = null;
      figure.querySelector(".tip").textContent = "";
      return;
    }
    let [x0, x1] = [chart.fromZero ? 0 : Math.min(...xs), Math.max(...xs, chart.upTo || 0)];
    if (x1 <= x0) x1 = x0 + 1;
    // a first step far above the rest would flatten all that follows: the scale holds 98% of the values, and the last ones
    const sorted = [...ys].sort((a, b) => a - b), most = sorted[Math.floor((sorted.length - 1) * (chart.clip ? 0.98 : 1))];
    const band = chart.band ? [chart.band[0], chart.band[1]] : [];
    let y0 = Math.min(chart.zero ? 0 : sorted[0], ...band), y1 = Math.max(most, ...series.map((one) => one.y.at(-1) ?? most), ...band);
    if (y1 <= y0) y1 = y0 + Math.abs(y0 || 1) * 0.1;
    y1 += (y1 - y0) * 0.06;
    if (!chart.zero) y0 -= (y1 - y0) * 0.04;
    const px = (v) => left + (v - x0) / (x1 - x0) * (width - left - right), py = (v) => height - bottom - (v - y0) / (y1 - y0) * (height - top - bottom);
    for (const at of ticks(y0, y1, 4)) {
      make(body, "line", { x1: left, x2: width - right, y1: py(at), y2: py(at), class: "grid" });
      make(body, "text", { x: left - 7, y: py(at), dy: ".32em", "text-anchor": "end" }, format(at));
    }
    const across = ticks(x0, x1, Math.max(2, width / 110));
    for (const at of across) make(body, "text", { x: px(at), y: height - bottom + 16, "text-anchor": "middle" }, short(at));
    make(body, "text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, chart.x);
    make(body, "line", { x1: left, x2: width - right, y1: height - bottom, y2: height - bottom, class: "base" });
    if (chart.band) {
      make(body, "rect", { x: left, width: width - left - right, y: py(band[1]), height: Math.max(2, py(band[0]) - py(band[1])), class: "band" });
      make(body, "text", { x: width - right - 4, y: py(band[1]) - 4, "text-anchor": "end", class: "inband" }, chart.band[2]);
    }
    const clip = `clip-${figure.id || chart.title.replace(/\W/g, "")}`;
    make(make(body, "clipPath", { id: clip }), "rect", { x: left - 5, y: 0, width: width - left - right + 10, height: height - bottom + 4 });
    const lines = make(body, "g", { "clip-path": `url(#${clip})` });
    chart.series.forEach((one, index) => {
      const colour = one.colour ?? index, kind = `s${colour % 8}`, dash = DASHES[Math.floor(one.dash ?? (colour >= 8 ? 1 : colour)) % DASHES.length];
      if (!one.x.length) return;
      if (one.dots) {
        one.x.forEach((x, i) => { if (one.y[i] !== null) make(lines, "circle", { cx: px(x), cy: py(one.y[i]), r: 4, class: `dot ${kind}` }); });
        return;
      }
      let path = "", pen = "M";
      one.x.forEach((x, i) => {
        if (one.y[i] === null) { pen = "M"; return; }
        path += `${pen}${px(x).toFixed(1)} ${py(one.y[i]).toFixed(1)}`;
        pen = "L";
      });
      make(lines, "path", { d: path, class: `line ${kind}`, ...(dash && { "stroke-dasharray": dash }) });
      if (one.x.length === 1) make(lines, "circle", { cx: px(one.x[0]), cy: py(one.y[0] ?? y0), r: 3, class: `dot ${kind}` });
    });
    const cross = make(body, "line", { y1: top, y2: height - bottom, class: "cross", visibility: "hidden" });
    const last = series.map((one) => `${one.name || chart.title} ${format(one.y.at(-1) ?? NaN)}`).join(", ");
    body.setAttribute("aria-label", `${chart.title} by ${chart.x}. Last: ${last}. Arrow keys read values.`);
    const stops = [...new Set(series.flatMap((one) => one.x))].sort((a, b) => a - b);
    figure.reader = {
      stops, value: (pixel) => x0 + (pixel * width / body.clientWidth - left) / (width - left - right) * (x1 - x0),
      read(at) {
        const text = series.map((one) => {
          const i = one.x.reduce((best, x, place) => (Math.abs(x - at) < Math.abs(one.x[best] - at) ? place : best), 0);
          return one.y[i] === null ? null : `${one.name ? `${one.name} ` : ""}${format(one.y[i])}${one.dots ? ` (${chart.x} ${plain(one.x[i])})` : ""}`;
        }).filter(Boolean).join(" · ");
        cross.setAttribute("x1", px(at)); cross.setAttribute("x2", px(at)); cross.setAttribute("visibility", "visible");
        figure.querySelector(".tip").textContent = `${chart.x} ${plain(at)}: ${text}`;
        figure.dataset.at = at;
      },
      leave() { cross.setAttribute("visibility", "hidden"); figure.querySelector(".tip").textContent = ""; delete figure.dataset.at; },
    };
    if (picked !== null) figure.reader.read(picked);
    legend(figure, chart);
  }

  function legend(figure, chart) {
    let list = figure.querySelector("ul");
    const named = chart.series.filter((one) => one.name);
    if (!named.length) { list?.remove(); return; }
    if (!list) { list = document.createElement("ul"); figure.append(list); }
    list.replaceChildren(...chart.series.map((one, index) => [one, one.colour ?? index]).filter(([one]) => one.name).map(([one, colour]) => {
      const item = document.createElement("li"), key = document.createElementNS(NS, "svg");
      key.setAttribute("width", 26); key.setAttribute("height", 10); key.setAttribute("aria-hidden", "true");
      const dash = DASHES[(one.dash ?? (colour >= 8 ? 1 : colour)) % DASHES.length];
      if (one.dots) make(key, "circle", { cx: 13, cy: 5, r: 4, class: `dot s${colour % 8}` });
      else make(key, "line", { x1: 0, x2: 26, y1: 5, y2: 5, class: `line s${colour % 8}`, ...(dash && { "stroke-dasharray": dash }) });
      item.append(key, one.name);
      return item;
    }));
  }

  function listen(figure, body) {
    const nearest = (at) => figure.reader.stops.reduce((best, x) => (Math.abs(x - at) < Math.abs(best - at) ? x : best));
    const follow = (event) => figure.reader?.read(nearest(figure.reader.value(event.clientX - body.getBoundingClientRect().left)));
    body.addEventListener("pointermove", follow);
    body.addEventListener("pointerdown", follow);
    for (const name of ["pointerleave", "blur"]) body.addEventListener(name, () => figure.reader?.leave());
    body.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key], reader = figure.reader;
      if (!reader || (!by && event.key !== "Escape")) return;
      event.preventDefault();
      if (!by) { reader.leave(); return; }
      const at = figure.dataset.at === undefined ? (by > 0 ? -1 : reader.stops.length) : reader.stops.indexOf(nearest(Number(figure.dataset.at)));
      reader.read(reader.stops[Math.max(0, Math.min(reader.stops.length - 1, at + by))]);
    });
  }

  return { draw, short };
})();
