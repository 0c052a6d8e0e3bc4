// The index of runs: sorts the table by its column headers and compares two runs. It creates text and elements, never markup.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const DASH = "\u2013", MINUS = "\u2212";
const FRAME = { left: 46, right: 344, top: 10, bottom: 178 }; // of a chart of 360 x 200

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function draw(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function number(value) {
  if (value === null || value === undefined || !isFinite(value)) return DASH;
  const size = Math.abs(value);
  const text = size >= 1000 ? Math.round(value).toLocaleString("en") : size && size < 1e-3 ? value.toExponential(2) : value.toPrecision(3);
  return text.replace("-", MINUS);
}

const percent = (ratio) => `${(100 * ratio).toFixed(1)}\u00a0%`;

// Sorting: a button in each column header; aria-sort states the order.

function sortable(table) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    if (!head.dataset.by) return;
    const button = make("button", { type: "button" }, head.textContent);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.sort;
      const order = head.dataset.by === "number" ? (a, b) => key(a) - key(b) : (a, b) => key(a).localeCompare(key(b), "en", { numeric: true });
      body.append(...[...body.rows].sort((a, b) => (down ? -order(a, b) : order(a, b))));
    });
  });
}

// Comparing.

function ticks(low, high, count) {
  const target = ((high - low) || Math.abs(high) || 1) / count, power = 10 ** Math.floor(Math.log10(target));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= target * 0.999);
  const found = [];
  for (let i = Math.floor(low / step + 1e-9); i <= Math.ceil(high / step - 1e-9); i++) found.push(Number((i * step).toPrecision(9)));
  return found.length > 1 ? found : [found[0], Number((found[0] + step).toPrecision(9))];
}

function chart(key, pair) {
  const traces = pair.map((run) => run.curves[key] || { line: [], marks: [] });
  const points = traces.flatMap((trace) => [...trace.line, ...trace.marks]);
  if (!points.length) return null;
  const xs = points.map((point) => point[0]), ys = points.map((point) => point[1]);
  const rows = ticks(Math.min(...ys), Math.max(...ys), 5);
  const left = Math.min(...xs), right = Math.max(Math.max(...xs), left + 1);
  const x = (value) => FRAME.left + ((FRAME.right - FRAME.left) * (value - left)) / (right - left);
  const y = (value) => FRAME.bottom - ((FRAME.bottom - FRAME.top) * (value - rows[0])) / (rows.at(-1) - rows[0]);
  const ends = (points) => (points.length ? `from ${number(points[0][1])} to ${number(points.at(-1)[1])}` : "no numbers");
  const said = pair.map((run, i) => `${run.run}: ${ends(traces[i].line)}`).join("; ");
  const svg = draw("svg", { viewBox: "0 0 360 200", role: "img", "aria-label": `${data.titles[key]} by step. ${said}.` });
  for (const value of rows) {
    svg.append(draw("path", { class: "rule", d: `M${FRAME.left} ${y(value)}H${FRAME.right}` }));
    svg.append(draw("text", { x: FRAME.left - 6, y: y(value) + 3.5, "text-anchor": "end" }, Number(value.toPrecision(6)).toLocaleString("en", { maximumSignificantDigits: 6 }).replace("-", MINUS)));
  }
  for (const value of ticks(left, right, 5).filter((each) => each >= left && each <= right)) {
    svg.append(draw("path", { class: "tick", d: `M${x(value)} ${FRAME.bottom}v4` }));
    svg.append(draw("text", { x: x(value), y: FRAME.bottom + 15, "text-anchor": "middle" }, value.toLocaleString("en")));
  }
  traces.forEach((trace, tone) => {
    if (trace.line.length) svg.append(draw("path", { class: `line t${tone}`, d: "M" + trace.line.map((p) => `${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("L") }));
    for (const p of trace.marks) svg.append(draw("circle", { class: `marks t${tone}`, cx: x(p[0]), cy: y(p[1]), r: 3.2 }));
  });
  return make("figure", { class: "chart" }, make("figcaption", {}, make("h3", {}, data.titles[key])), svg);
}

function swatch(tone) {
  const svg = draw("svg", { class: "swatch", viewBox: "0 0 24 10", "aria-hidden": "true" });
  svg.append(draw("path", { class: `line t${tone}`, d: "M1 5H23" }));
  return svg;
}

function table(title, heads, rows) {
  const head = make("tr", {}, ...heads.map((text, i) => make("th", { scope: "col", class: i ? "n" : "" }, text)));
  const body = rows.map((cells) => make("tr", {}, ...cells.map((cell, i) => (i ? make("td", { class: "n" }, ...[cell].flat()) : make("th", { scope: "row" }, cell)))));
  const whole = make("table", { class: "narrow" }, make("caption", {}, title), make("thead", {}, head), make("tbody", {}, ...body));
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title }, whole);
}

function measured(score) {
  return score ? [`${number(score.mean)} `, make("small", {}, `${number(score.low)} to ${number(score.high)}`)] : DASH;
}

function scores(pair) {
  const rows = [];
  const accuracy = (run, side) => run.accuracy && [`${percent(run.accuracy[side].mean)} `, make("small", {}, `${percent(run.accuracy[side].low)} to ${percent(run.accuracy[side].high)}`)];
  if (pair.some((run) => run.accuracy)) {
    for (const [side, label] of [["before", "before training"], ["after", "after"]]) rows.push([`Held-out accuracy, ${label}`, ...pair.map((run) => accuracy(run, side) || DASH)]);
  }
  const names = [...new Set(pair.flatMap((run) => run.scores.map((score) => score.name)))];
  for (const name of names) {
    const found = pair.map((run) => run.scores.find((score) => score.name === name));
    for (const side of ["base", "aligned"]) rows.push([`${name}, ${side}`, ...found.map((score) => measured(score && score[side]))]);
  }
  return rows;
}

function samples(pair) {
  const same = pair[0].samples.flatMap((sample) => {
    const other = pair[1].samples.find((each) => each.prompt === sample.prompt && each.seed === sample.seed);
    return other ? [[sample, other]] : [];
  });
  return same.map(([first, second]) => {
    const image = (run, sample, tone) => make("div", {},
      make("img", { src: `${encodeURIComponent(run.run)}/evaluation/${encodeURIComponent(sample.aligned)}`, loading: "lazy", alt: `${run.run}, no. ${sample.seed}: ${sample.prompt.slice(0, 90)}` }),
      make("small", { class: tone }, run.run));
    const images = make("div", { class: "images" }, image(pair[0], first, "ours"), image(pair[1], second, "other"));
    return make("figure", { class: "pair" }, images, make("figcaption", {}, first.prompt, " ", make("small", {}, `no.\u00a0${first.seed}`)));
  });
}

function compare(pair) {
  const heads = ["", ...pair.map((run) => run.run)], parts = [];
  const add = (title, ...found) => parts.push(make("h3", { class: "later" }, title), ...found);
  parts.push(make("p", { class: "legend" }, ...pair.map((run, tone) => make("span", {}, swatch(tone), ` ${run.run}`))));
  const drawn = Object.keys(data.titles).map((key) => chart(key, pair)).filter(Boolean);
  add("Curves", drawn.length ? make("div", { class: "grid charts" }, ...drawn) : make("p", {}, "Neither run has trained yet."));
  const rows = scores(pair);
  add("Scores", rows.length ? table("Scores of both runs, with 95 % intervals", heads, rows) : make("p", {}, "Neither run has scores."));
  const settings = data.settings.flatMap((key, i) => (pair[0].values[i] === pair[1].values[i] ? [] : [[make("code", {}, key), ...pair.map((run) => run.values[i] ?? DASH)]]));
  add("Settings that differ", settings.length ? table("Settings that differ", heads, settings) : make("p", {}, "None: both runs have the same configuration."));
  const shown = samples(pair);
  add("Samples of the same prompt and seed", shown.length ? make("div", { class: "grid pairs" }, ...shown) : make("p", {}, "The runs have no samples in common."));
  document.getElementById("comparison").replaceChildren(...parts);
}

function choose() {
  const form = document.getElementById("choice"), picks = ["one", "other"].map((id) => document.getElementById(id));
  if (data.runs.length < 2) {
    document.getElementById("comparison").append(make("p", {}, "There are fewer than two runs."));
    return;
  }
  const wanted = new URLSearchParams(location.hash.slice(1));
  picks.forEach((pick, i) => {
    pick.append(...data.runs.map((run) => make("option", { value: run.run }, run.run)));
    const given = wanted.get(pick.id);
    pick.value = data.runs.some((run) => run.run === given) ? given : data.runs[1 - i].run;
    pick.addEventListener("change", () => {
      history.replaceState(null, "", `#${new URLSearchParams(picks.map((each) => [each.id, each.value]))}`);
      show();
    });
  });
  const show = () => compare(picks.map((pick) => data.runs.find((run) => run.run === pick.value)));
  form.hidden = false;
  show();
}

sortable(document.getElementById("table"));
choose();
