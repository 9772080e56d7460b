"use strict";
// All of this adds to a page that can be read without it: tables that sort, filter and hide columns, values under the
// pointer, zoom, runs that open, cost against quality by any measure. Nothing is fetched.
(() => {
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const data = (element) => (element ? JSON.parse(element.textContent) : null);
const SVG = "http://www.w3.org/2000/svg";
const STEP = 200; // rows that are shown at a time
const FEW = 8; // values of a column that can be chosen from
const LONG = 28; // letters of a text from which on its cell wraps (page.py)

function fitted(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}
const make = (tag, attributes = {}, ...children) => fitted(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) => fitted(document.createElementNS(SVG, tag), attributes, children);

// ---- Colours

function theme() {
  const root = document.documentElement, button = $("#theme");
  const prefers = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefers.matches);
  const label = () => { button.textContent = isDark() ? "Light colours" : "Dark colours"; };
  try { root.dataset.theme = localStorage.getItem("lorabench-theme") || ""; } catch { /* a page that keeps nothing */ }
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("lorabench-theme", root.dataset.theme); } catch { /* as above */ }
    label();
  });
  prefers.addEventListener("change", label);
  button.hidden = false;
  label();
}

// ---- Tables

/** What a cell is sorted by: "2.31 ± 0.02", "−3.9e-5" and "1,234" as numbers. */
function number(text) {
  const found = text.replace(/−/g, "-").replace(/,/g, "").match(/^[+-]?\d*\.?\d+(e[+-]?\d+)?/i);
  return found ? parseFloat(found[0]) : NaN;
}

/** Numbers before words, and last what is missing, whichever way it is sorted. */
function compare(a, b, sign) {
  const empty = [a, b].map((text) => text === "" || text === "–");
  if (empty[0] || empty[1]) return empty[0] - empty[1];
  const [x, y] = [number(a), number(b)];
  if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y) || sign * a.localeCompare(b, "en", { numeric: true });
  return sign * (x - y);
}

const plain = () => {};

/** Makes a table sort, filter and hide columns; `decorate` is given each row once that is shown. */
function table(box, decorate = plain) {
  const element = $("table", box), body = $("tbody", element), title = $("caption", element).textContent;
  const heads = [...$("thead tr:last-child", element).cells], spans = [...$("thead", element).rows[0].cells];
  const names = heads.map((head) => [...head.childNodes].map((node) => node.textContent).join(" "));
  const failed = document.body.dataset.failed.split(" ").filter(Boolean);
  const further = data($(":scope > script", box)) || [];
  const rows = [...body.rows].map((row) => ({ element: row, texts: [...row.cells].map((cell) => cell.textContent) }));
  rows.push(...further.map((texts) => ({ texts })));
  rows.slice(0, body.rows.length).forEach(decorate);
  if (rows.length < 2 && decorate === plain) return null;
  const now = { column: null, sign: 1, text: "", values: new Map(), hidden: new Set(), most: STEP };

  function shown(row) {
    if (!row.element) {
      row.element = make("tr", {}, ...row.texts.map((text, place) => {
        const isBad = failed.some((status) => new RegExp(`\\b${status}\\b`).test(text)) && text.length < 40;
        const isNumber = heads[place].classList.contains("num"), isLong = !isNumber && text.length > LONG;
        const kind = [isNumber && "num", isLong && "long", isBad && "bad"].filter(Boolean).join(" ");
        return make("td", { class: kind || null }, text);
      }));
      decorate(row);
    }
    [...row.element.cells].forEach((cell, place) => { cell.hidden = now.hidden.has(place); });
    return row.detail ? [row.element, row.detail] : [row.element];
  }

  function matching() {
    const words = now.text.toLowerCase().split(/\s+/).filter(Boolean);
    const found = rows.filter((row) => {
      for (const [place, value] of now.values) if (row.texts[place] !== value) return false;
      const text = words.length ? row.texts.join(" ").toLowerCase() : "";
      return words.every((word) => text.includes(word));
    });
    const { column, sign } = now;
    return column === null ? found : found.sort((a, b) => compare(a.texts[column], b.texts[column], sign));
  }

  function show() {
    const found = matching();
    body.replaceChildren(...found.slice(0, now.most).flatMap(shown));
    heads.forEach((head, place) => {
      head.setAttribute("aria-sort", now.column !== place ? "none" : now.sign > 0 ? "ascending" : "descending");
      head.hidden = now.hidden.has(place);
    });
    if (spans[0] !== heads[0]) {
      let first = 0;
      for (const span of spans) {
        const width = span.lorabenchWidth ??= span.colSpan;
        const left = heads.slice(first, first + width).filter((head) => !head.hidden).length;
        span.hidden = !left;
        span.colSpan = left || 1;
        first += width;
      }
    }
    menuTitle.textContent = now.hidden.size ? `Columns (${now.hidden.size} hidden)` : "Columns";
    count.textContent = found.length === rows.length ? `${rows.length} rows` : `${found.length} of ${rows.length} rows`;
    more.hidden = found.length <= now.most;
    more.textContent = `Show ${Math.min(STEP, found.length - now.most)} more of ${found.length} rows`;
  }

  heads.forEach((head, place) => {
    const sort = () => {
      if (now.column !== place) [now.column, now.sign] = [place, 1];
      else if (now.sign > 0) now.sign = -1;
      else now.column = null;
      show();
    };
    head.replaceChildren(make("button", { type: "button", class: "sort", onclick: sort }, ...head.childNodes));
  });

  /** A line a column: whether it is shown, and where it has few values, which of them. */
  function columns(menu) {
    const lines = names.map((name, place) => {
      const box = make("input", { type: "checkbox", checked: !now.hidden.has(place), onchange: () => {
        now.hidden[box.checked ? "delete" : "add"](place);
        show();
      } });
      const values = [...new Set(rows.map((row) => row.texts[place]))];
      const line = make("div", {}, make("label", {}, box, name));
      if (values.length > 1 && values.length <= FEW) {
        const choice = make("select", { "aria-label": `${name}: only`, onchange: () => {
          if (choice.selectedIndex) now.values.set(place, values[choice.selectedIndex - 1]);
          else now.values.delete(place);
          show();
        } }, ...["all", ...values].map((value) => make("option", {}, value || "(empty)")));
        line.append(choice);
      }
      return line;
    });
    menu.append(make("div", {}, ...lines));
  }

  /** Leave out columns that are the same in every row, the last ones first, as long as the page is too narrow. */
  function narrow() {
    for (let place = heads.length - 1; place > 0 && scroll.scrollWidth > scroll.clientWidth + 1; place--) {
      if (rows.some((row) => row.texts[place] !== rows[0].texts[place])) continue;
      now.hidden.add(place);
      show();
    }
  }

  const count = make("span", { role: "status" }), menuTitle = make("summary", {}, "Columns");
  const more = make("button", { type: "button", class: "more", onclick: () => { now.most += STEP; show(); } });
  const search = make("input", { type: "search", placeholder: "Filter rows", "aria-label": `Filter rows: ${title}`,
    oninput: () => { now.text = search.value; show(); } });
  const menu = make("details", { class: "menu", ontoggle: () => { if (menu.children.length < 2) columns(menu); } }, menuTitle);
  const hasTools = rows.length > 5 || heads.length > 7;
  if (hasTools) box.prepend(make("div", { class: "tools" }, search, menu, count));
  box.append(more);
  const scroll = $(".scroll", box);
  fitted(scroll, { tabindex: 0, role: "region", "aria-label": title }, []);
  show();
  const seen = new ResizeObserver(() => { // as soon as it is not in what is folded
    if (!scroll.clientWidth) return;
    seen.disconnect();
    if (hasTools && rows.length > 1) narrow();
  });
  seen.observe(scroll);
  return {
    row: (text) => rows.find((row) => row.texts[0] === text),
    /** Show the row of that first cell, whatever is filtered. */
    reveal(text) {
      const place = matching().findIndex((row) => row.texts[0] === text);
      if (place < 0) {
        now.values.clear();
        [now.text, search.value] = ["", ""];
        $$("select", menu).forEach((choice) => { choice.selectedIndex = 0; });
      }
      now.most = Math.max(now.most, matching().findIndex((row) => row.texts[0] === text) + 1);
      show();
    },
    show,
  };
}

// ---- Values under the pointer, and zoom

const short = (value) => (value === null ? "–" : String(parseFloat(value.toPrecision(4))).replace("-", "−"));
const along = ([low, high, log], value) => (log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low));

/** Each value of a panel with its place, as shares of the figure. */
function items(panel) {
  const [left, top, width, height] = panel.box, [x, y] = panel.labels;
  if (panel.cells) {
    const [down, across] = [panel.rows.length, panel.columns.length];
    return panel.cells.flatMap((row, i) => row.map((value, j) => ({
      at: [left + (j + 0.5) / across * width, top + (i + 0.5) / down * height],
      half: [width / across / 2, height / down / 2],
      lines: [panel.title, `${y || "row"}: ${panel.rows[i]}`, `${x || "column"}: ${panel.columns[j]}`, short(value)],
    })));
  }
  return panel.series.flatMap(({ name, names, points }) => points.map((point, place) => ({
    at: [left + along(panel.x, point[0]) * width, top + (1 - along(panel.y, point[1])) * height],
    lines: [names ? names[place] : name, panel.title, `${x || "x"}: ${short(point[0])}`, `${y || "y"}: ${short(point[1])}`],
  }))).filter(({ at }) => at.every((share) => share > -0.01 && share < 1.01));
}

/** Of a drawing in `plot`, which may be a picture or made here: values by pointer and arrow keys, zoom and shift. */
function explore(plot, panels, title) {
  const stage = plot.firstElementChild, tip = $("#tip"), all = panels.flatMap(items);
  const dot = make("div", { class: "dot", hidden: true });
  const view = { scale: 1, x: 0, y: 0 };
  let chosen = -1, drag = false;

  function move(scale, x, y) {
    const { width, height } = plot.getBoundingClientRect();
    view.scale = Math.min(20, Math.max(1, scale));
    view.x = Math.min(0, Math.max(width * (1 - view.scale), x));
    view.y = Math.min(0, Math.max(height * (1 - view.scale), y));
    stage.style.transform = view.scale === 1 ? "" : `translate(${view.x}px, ${view.y}px) scale(${view.scale})`;
    plot.classList.toggle("zoomed", view.scale > 1);
    hide();
  }
  function zoom(factor, event = null) {
    const { left, top, width, height } = plot.getBoundingClientRect();
    const x = event ? event.clientX - left : width / 2, y = event ? event.clientY - top : height / 2;
    const scale = Math.min(20, Math.max(1, view.scale * factor)), ratio = scale / view.scale;
    move(scale, x - (x - view.x) * ratio, y - (y - view.y) * ratio);
  }
  function hide() {
    tip.hidden = dot.hidden = true;
  }
  function tell(place) {
    const { at, lines } = all[chosen = place];
    const inner = stage.getBoundingClientRect(), outer = plot.getBoundingClientRect();
    const x = inner.left + at[0] * inner.width, y = inner.top + at[1] * inner.height;
    dot.style.left = `${x - outer.left}px`;
    dot.style.top = `${y - outer.top}px`;
    tip.replaceChildren(...lines.filter(Boolean).map((line) => make("div", {}, line)));
    tip.hidden = dot.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(innerWidth - width - 4, x + 14))}px`;
    tip.style.top = `${y + height + 20 > innerHeight ? y - height - 12 : y + 14}px`;
  }
  function nearest(event) {
    const { left, top, width, height } = stage.getBoundingClientRect();
    let best = 26, place = -1;
    all.forEach(({ at, half }, index) => {
      const x = Math.abs(left + at[0] * width - event.clientX), y = Math.abs(top + at[1] * height - event.clientY);
      const away = half ? (x < half[0] * width && y < half[1] * height ? 0 : 99) : Math.hypot(x, y);
      if (away < best) [best, place] = [away, index];
    });
    return place;
  }
  plot.addEventListener("pointermove", (event) => {
    if (drag) return move(view.scale, view.x + event.movementX, view.y + event.movementY);
    const place = nearest(event);
    return place < 0 ? hide() : tell(place);
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("dblclick", (event) => zoom(2, event));
  plot.addEventListener("pointerdown", (event) => {
    if (view.scale === 1 || event.target.closest("button")) return;
    drag = true;
    plot.setPointerCapture(event.pointerId);
  });
  for (const end of ["pointerup", "pointercancel"]) plot.addEventListener(end, () => { drag = false; });
  plot.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(event.deltaY < 0 ? 1.25 : 0.8, event);
  }, { passive: false });
  plot.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    const keys = { "+": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: () => move(1, 0, 0), Escape: hide };
    if (event.key in steps && all.length) tell((chosen + steps[event.key] + all.length) % all.length);
    else if (event.key in keys) keys[event.key]();
    else return;
    event.preventDefault();
  });
  const button = (text, label, onclick) => make("button", { type: "button", "aria-label": label, title: label, onclick }, text);
  plot.append(dot, make("div", { class: "zoom" }, button("+", "Zoom in", () => zoom(1.5)),
    button("−", "Zoom out", () => zoom(1 / 1.5)), button("↺", "Whole figure", () => move(1, 0, 0))));
  fitted(plot, { tabindex: 0, role: "group", "aria-label": `${title}: arrow keys go through its values, + and − zoom` }, []);
}

// ---- Charts that are drawn here, from data

function ticks([low, high, log]) {
  if (log) {
    const marks = [];
    const factors = high / low > 300 ? [1] : [1, 2, 5];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
      for (const factor of factors) marks.push(factor * 10 ** power);
    }
    return marks.filter((mark) => mark >= low && mark <= high);
  }
  const raw = (high - low) / 5, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((factor) => factor * unit >= raw) * unit;
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, place) => (first + place) * step);
}

function range(values, isLinear = false) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (!isLinear && low > 0 && high > 20 * low) return [low / 1.2, high * 1.2, 1];
  const margin = 0.06 * (high - low) || 0.05 * Math.abs(high) || 1;
  return [low - margin, high + margin, 0];
}

/** Lines and points with axes; a series is `{name, points, names, line, dots, color}`. A curve's x axis is linear. */
function chart(series, labels, title, isCurve = false) {
  const [width, height] = isCurve ? [560, 280] : [640, 340];
  const points = series.flatMap((each) => each.points);
  const box = [64 / width, 12 / height, 1 - 80 / width, 1 - 62 / height];
  const panel = { box, x: range(points.map(([x]) => x), isCurve), y: range(points.map(([, y]) => y)), labels, title: "", series };
  const at = ([x, y]) => [(box[0] + along(panel.x, x) * box[2]) * width, (box[1] + (1 - along(panel.y, y)) * box[3]) * height];
  const [left, top, right, bottom] = [64, 12, width - 16, height - 50];
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  const text = (x, y, words, anchor, turn) => draw("text", { x, y, "text-anchor": anchor, transform: turn || null }, words);
  for (const mark of ticks(panel.x)) {
    const [x] = at([mark, panel.y[0]]);
    svg.append(draw("line", { x1: x, x2: x, y1: top, y2: bottom, class: "rule" }), text(x, bottom + 16, short(mark), "middle"));
  }
  for (const mark of ticks(panel.y)) {
    const [, y] = at([panel.x[0], mark]);
    svg.append(draw("line", { x1: left, x2: right, y1: y, y2: y, class: "rule" }), text(left - 6, y + 4, short(mark), "end"));
  }
  svg.append(text((left + right) / 2, height - 10, labels[0], "middle"),
    text(0, 0, labels[1], "middle", `translate(14 ${(top + bottom) / 2}) rotate(-90)`));
  for (const { points: own, line, dots, color = "var(--series)" } of series) {
    const places = own.map(at);
    if (line) svg.append(draw("polyline", { points: places.map((each) => each.join()).join(" "), fill: "none", stroke: color, "stroke-width": 1.6 }));
    if (dots) svg.append(...places.map(([cx, cy]) => draw("circle", { cx, cy, r: 4.5, fill: color })));
  }
  const named = series.flatMap(({ points: own, names = [] }) => names.map((name, place) => [name, ...at(own[place])]));
  const taken = named.map(([, x, y]) => [x - 6, y - 6, x + 6, y + 6]);
  for (const [name, x, y] of named.length <= 24 ? named : []) {
    const wide = 5.6 * name.length, start = x + 8 + wide < right ? x + 8 : x - 8 - wide;
    const place = [start, y - 6, start + wide, y + 6];
    if (taken.some((other) => place[0] < other[2] && other[0] < place[2] && place[1] < other[3] && other[1] < place[3])) continue;
    taken.push(place);
    svg.append(draw("text", { x: start, y: y + 4, class: "label" }, name));
  }
  const plot = make("div", { class: "plot chart", style: `max-width: ${width}px` }, svg);
  explore(plot, [panel], title);
  return plot;
}

/** The points that no other beats in both; `more` says of x and y whether more is better. As the figure cost_quality has it. */
function front(points, more) {
  const [x, y] = more.map((better) => (better ? -1 : 1));
  const costs = points.map((point) => [x * point[0], y * point[1]]);
  const order = [...costs.keys()].sort((a, b) => costs[a][0] - costs[b][0] || costs[a][1] - costs[b][1]);
  let best = Infinity;
  return order.filter((place) => {
    const isBetter = costs[place][1] < best;
    best = Math.min(best, costs[place][1]);
    return isBetter;
  });
}

function costs(box) {
  const { measures, points, quality } = data($("script", box));
  const place = (wanted) => Math.max(0, measures.findIndex(({ name }) => wanted.includes(name)));
  const choice = (label, chosen) => {
    const select = make("select", { onchange: show }, ...measures.map(({ label: text }) => make("option", {}, text)));
    select.selectedIndex = chosen;
    return [select, make("label", {}, `${label} `, select)];
  };
  const [cost, costLabel] = choice("Cost", place(["peak_gib", "tensor_peak_gib", "total_seconds"]));
  const [gain, gainLabel] = choice("Quality", place([quality]));
  const search = make("input", { type: "search", placeholder: "Filter settings", "aria-label": "Filter settings", oninput: show });
  const only = make("input", { type: "checkbox", onchange: show });
  const canvas = make("div"), best = make("p", { class: "notes", role: "status" });
  function show() {
    const pair = [cost.selectedIndex, gain.selectedIndex], words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = points.filter(({ name, values }) => pair.every((index) => values[index] !== null) && words.every((word) => name.toLowerCase().includes(word)));
    const places = found.map(({ values }) => pair.map((index) => values[index]));
    const ends = front(places, pair.map((index) => measures[index].more));
    const labels = pair.map((index) => `${measures[index].label}, ${measures[index].more ? "more" : "less"} is better`);
    const on = { name: "", points: ends.map((index) => places[index]), names: ends.map((index) => found[index].name), line: true, dots: true, color: "var(--link)" };
    const off = [...places.keys()].filter((index) => !ends.includes(index));
    const others = { name: "", points: off.map((index) => places[index]), names: off.map((index) => found[index].name), dots: true };
    canvas.replaceChildren(...(found.length ? [chart(only.checked ? [on] : [others, on], labels, "Cost against quality")] : []));
    best.replaceChildren(ends.length ? `On the Pareto front, ${ends.length} of ${found.length}: ` : "No setting is left.",
      ...ends.flatMap((index, n) => [n ? "; " : "", make("a", { href: `#${found[index].run}` }, found[index].name)]));
  }
  box.append(make("h3", {}, "Cost against quality"), make("div", { class: "tools" }, costLabel, gainLabel, search, make("label", {}, only, "Pareto front only")), canvas, best);
  box.hidden = false;
  show();
}

// ---- Runs that open

function runs(box) {
  const source = $("#details");
  let found = null, places = null;
  const all = () => {
    if (!found) {
      found = data(source);
      places = new Map(found.ids.map((id, place) => [id, place]));
    }
    return found;
  };
  const heads = $$("thead th", box).length;
  const small = (names, rows, title) => {
    const kinds = names.map((_, place) => (rows.every((row) => /^[−+–\d]/.test(row[place])) ? "num" : null));
    const head = make("tr", {}, ...names.map((name, place) => make("th", { scope: "col", class: kinds[place] }, name)));
    const lines = rows.map((row) => make("tr", {}, ...row.map((cell, place) => make("td", { class: kinds[place] }, cell))));
    return make("div", { class: "scroll" }, make("table", {}, make("caption", { class: "unseen" }, title), make("thead", {}, head), make("tbody", {}, ...lines)));
  };
  const part = (title, ...content) => make("section", {}, make("h4", {}, title), ...content);

  function neighbours(own) {
    const { keys, values, codes, ids, quality, status } = all();
    const lines = [];
    for (let other = 0; other < ids.length && lines.length < 60; other += 1) {
      const differ = keys.filter((_, key) => codes[key][other] !== codes[key][own]);
      if (other === own || differ.length !== 1) continue;
      const key = keys.indexOf(differ[0]), text = (run) => values[key][codes[key][run]] ?? "–";
      const [mine, theirs] = [own, other].map((run) => quality.values[run] ?? null);
      lines.push([`${differ[0]}: ${text(own)} → ${text(other)}`, make("a", { href: `#${ids[other]}` }, ids[other]), status[other],
        short(theirs), mine === null || theirs === null ? "–" : (theirs > mine ? "+" : "") + short(theirs - mine)]);
    }
    return lines;
  }

  function view(id) {
    const { common, keys, values, codes, quality, curves, layers, logs, status } = all(), own = places.get(id);
    const folder = `../runs/${id}/`, parts = [];
    const files = ["spec.json", "record.json", "steps.jsonl", "log.txt", "updates/"];
    if (status[own] !== "missing") {
      parts.push(make("p", {}, "Files: ", ...files.flatMap((name, n) => [n ? ", " : "", make("a", { href: folder + name }, name)])));
    }
    const near = neighbours(own);
    if (near.length) parts.push(part("Runs that differ in one key", small(["Key", "Run", "Status", quality.label, "Difference"], near, "Runs that differ in one key")));
    const curve = curves.runs[own];
    if (curve) {
      const steps = curves.grids[curve[0]], lines = [{ name: "Training loss", line: true, points: steps.map((step, n) => [step, curve[1][n]]).filter((pair) => pair[1] !== null) }];
      if (curve[2].length) lines.push({ name: curves.label, dots: true, color: "var(--link)", points: curve[2].filter((pair) => pair[1] !== null) });
      if (lines[0].points.length) parts.push(part("Loss over the steps", chart(lines, ["Step", curve[2].length ? `Training loss; dots: ${curves.label}` : "Training loss"], `Loss of ${id} over the steps`, true)));
    }
    const inner = layers.runs[own];
    if (inner) parts.push(part("Layers", small(["Layer", ...layers.heads], inner.map(([layer, ...numbers]) => [layers.names[layer], ...numbers.map(short)]), "Layers")));
    else if (layers.startout) parts.push(make("p", { class: "notes" }, "Layer by layer: tables/metrics.parquet."));
    const swept = keys.map((key, n) => [key, values[n][codes[n][own]]]).filter(([, text]) => text !== undefined);
    const words = ([key, text], strong) => [make("dt", {}, key), make("dd", {}, strong ? make("b", {}, text) : text)];
    parts.push(part("Spec", make("dl", { class: "spec" }, ...swept.flatMap((pair) => words(pair, true)), ...Object.entries(common).flatMap((pair) => words(pair, false)))));
    if (logs[own]) parts.push(part("The end of its log", make("pre", {}, logs[own])));
    return parts;
  }

  function toggle(row, button, isOpen) {
    button.setAttribute("aria-expanded", isOpen);
    row.detail = isOpen ? make("tr", { class: "detail" }, make("td", { colspan: heads }, make("div", {}, ...view(row.texts[0])))) : null;
    rowsOf.show();
  }
  function decorate(row) {
    const first = row.element.cells[0], id = row.texts[0];
    row.element.id = id;
    row.button = make("button", { type: "button", class: "open", "aria-expanded": "false",
      onclick: () => toggle(row, row.button, row.button.getAttribute("aria-expanded") !== "true") }, make("code", {}, id));
    first.replaceChildren(row.button);
  }
  const rowsOf = table(box, source ? decorate : plain);
  /** A link to a run opens it. */
  function follow() {
    const id = location.hash.slice(1), row = rowsOf && source && rowsOf.row(id);
    if (!row) return;
    box.closest("details").open = true;
    rowsOf.reveal(id);
    if (row.button.getAttribute("aria-expanded") !== "true") toggle(row, row.button, true);
    row.element.scrollIntoView();
    row.button.focus();
  }
  addEventListener("hashchange", follow);
  follow();
}

// ---- The page

theme();
$$(".table").forEach((box) => (box.id === "all-runs" ? runs(box) : table(box)));
$$("figure").forEach((figure) => explore($(".plot", figure), data($("script", figure)) || [], $("img", figure).alt));
$$("#costs").forEach(costs);
const contents = $(".contents"), narrow = matchMedia("(max-width: 64rem)");
const fold = () => { contents.open = !narrow.matches; };
narrow.addEventListener("change", fold);
fold();
contents.addEventListener("click", (event) => { if (event.target.closest("a") && narrow.matches) contents.open = false; });
document.addEventListener("click", (event) => $$(".menu[open]").forEach((menu) => { if (!menu.contains(event.target)) menu.open = false; }));
document.addEventListener("keydown", (event) => { if (event.key === "Escape") $$(".menu[open]").forEach((menu) => { menu.open = false; }); });
addEventListener("beforeprint", () => $$("details:not(.menu)").forEach((each) => { each.open = true; }));
})();
