(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const SIDES = ["before", "after"];
  const colour = new Map(data.patterns.map((name, place) => [name, `c${place % 12}`]));
  const CHAR = 7.3, SMALL = 6.4, HEIGHT = 38;

  at("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
  });
  // Comments of the code are dimmed and keywords coloured; texts are set, never parsed.
  for (const block of document.querySelectorAll("pre.code")) {
    const parts = block.textContent.split(/(#[^\n]*|\b(?:import|from|def|return|as|None|True|False)\b)/);
    block.replaceChildren(...parts.map((text, place) => {
      if (place % 2 === 0) return document.createTextNode(text);
      const made = document.createElement("span");
      made.className = text.startsWith("#") ? "com" : "key";
      made.textContent = text;
      return made;
    }));
  }
  // On a narrow page each row of a table is a card: its cells say what column they are of.
  for (const table of document.querySelectorAll(".scroll table")) {
    const titles = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
    for (const row of table.tBodies[0].rows) [...row.cells].forEach((cell, place) => { cell.dataset.column = titles[place]; });
  }
  if (!data.graphs.length) return;

  const hint = at("detail").firstElementChild;
  const state = { graph: data.graphs[0], folded: new Set(), drawn: new Map(), view: null, size: null, selected: null };

  function el(tag, attributes, parent) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (parent) parent.append(made);
    return made;
  }

  const moduleOf = (cell) => (cell.before || cell.after).module;
  const isInside = (module, outer) => module === outer || module.startsWith(outer + ".");

  function modulesOf(graph) {
    const found = new Set();
    for (const cell of graph.cells) {
      const parts = moduleOf(cell).split(".");
      if (parts[0] !== "") parts.forEach((_, end) => found.add(parts.slice(0, end + 1).join(".")));
    }
    return [...found].sort();
  }

  // Which box each cell is drawn in: its own, or that of the outermost folded module around it.
  function boxesOf(graph) {
    const outermost = (module) =>
      [...state.folded].filter((name) => isInside(module, name)).sort((a, b) => a.length - b.length)[0];
    const boxOf = new Map();
    for (const cell of graph.cells) {
      const fold = outermost(moduleOf(cell));
      boxOf.set(cell.id, fold === undefined ? `n${cell.id}` : `f${fold}`);
    }
    // An input that only a folded module reads goes with it.
    const readers = new Map();
    for (const side of SIDES) for (const [from, to] of graph[side]) {
      if (!readers.has(from)) readers.set(from, new Set());
      readers.get(from).add(boxOf.get(to));
    }
    for (const cell of graph.cells) {
      const kind = (cell.before || cell.after).kind;
      const boxes = readers.get(cell.id);
      if (kind === "input" && boxes && boxes.size === 1 && [...boxes][0].startsWith("f")) boxOf.set(cell.id, [...boxes][0]);
    }
    const boxes = new Map();
    for (const cell of graph.cells) {
      const id = boxOf.get(cell.id);
      if (!boxes.has(id)) boxes.set(id, { id, cells: [], fold: id.startsWith("f") ? id.slice(1) : null });
      boxes.get(id).cells.push(cell);
    }
    return { boxes, boxOf };
  }

  const shortType = (type) => { const text = type.replaceAll(", ", ","); return text.length > 30 ? text.slice(0, 29) + "…" : text; };
  const shortTitle = (title) => (title.length > 34 ? "…" + title.slice(-33) : title);

  function labelOf(box, side) {
    if (box.fold !== null) {
      const here = box.cells.filter((cell) => cell[side]);
      if (!here.length) return null;
      const ops = here.filter((cell) => cell[side].kind === "op").length;
      return { title: `▸ ${shortTitle(box.fold)}`, type: `${here.length} nodes, ${ops} ops`, kind: "fold" };
    }
    const node = box.cells[0][side];
    return node && { title: shortTitle(node.title), type: shortType(node.type), kind: node.kind };
  }

  function edgesOf(side, boxOf) {
    const edges = new Map();
    for (const [from, to] of state.graph[side]) {
      const a = boxOf.get(from), b = boxOf.get(to);
      if (a !== b) edges.set(`${a}\u0000${b}`, [a, b]);
    }
    return edges;
  }

  function layOut() {
    const { boxes, boxOf } = boxesOf(state.graph);
    const graph = new dagre.graphlib.Graph();
    graph.setGraph({ rankdir: "LR", nodesep: 8, edgesep: 6, ranksep: 16, marginx: 12, marginy: 12 });
    graph.setDefaultEdgeLabel(() => ({}));
    for (const box of boxes.values()) {
      box.label = Object.fromEntries(SIDES.map((side) => [side, labelOf(box, side)]));
      const widths = SIDES.flatMap((side) => box.label[side]
        ? [box.label[side].title.length * CHAR, box.label[side].type.length * SMALL] : []);
      graph.setNode(box.id, { width: Math.max(40, ...widths) + 18, height: HEIGHT });
    }
    const edges = Object.fromEntries(SIDES.map((side) => [side, edgesOf(side, boxOf)]));
    for (const side of SIDES) for (const [a, b] of edges[side].values()) graph.setEdge(a, b);
    dagre.layout(graph);
    state.size = { width: graph.graph().width, height: graph.graph().height };
    state.boxes = boxes; state.boxOf = boxOf; state.edges = edges; state.layout = graph;
  }

  function pathOf(points) {
    const [first, ...rest] = points;
    let path = `M${first.x.toFixed(1)},${first.y.toFixed(1)}`;
    rest.forEach((point, place) => {
      const before = place ? rest[place - 1] : first, x = (before.x + point.x) / 2;
      path += `C${x.toFixed(1)},${before.y.toFixed(1)} ${x.toFixed(1)},${point.y.toFixed(1)} ${point.x.toFixed(1)},${point.y.toFixed(1)}`;
    });
    return path;
  }

  function draw() {
    layOut();
    state.drawn.clear();
    for (const side of SIDES) {
      const svg = at(side);
      svg.replaceChildren();
      const lines = el("g", {}, svg);
      for (const [a, b] of state.edges[side].values()) {
        const edge = state.layout.edge(a, b);
        if (edge) el("path", { class: "edge", d: pathOf(edge.points), "data-from": a, "data-to": b }, lines);
      }
      if (side === "after") for (const box of state.boxes.values()) if (!box.label.after) drawGhost(svg, box);
      for (const box of state.boxes.values()) drawBox(svg, box, side);
      at(`count-${side}`).textContent = `${state.graph.cells.filter((cell) => cell[side]).length} nodes`;
    }
    drawOverview();
    drawChips();
    search();
    select(state.boxes.has(state.selected) ? state.selected : null, false);
  }

  // What went leaves its outline, in the colour of the pattern that took it.
  function drawGhost(svg, box) {
    const place = state.layout.node(box.id), pattern = box.cells.map((cell) => cell.pattern).filter(Boolean).pop();
    el("rect", { class: `ghost ${pattern ? colour.get(pattern) || "" : ""}`, x: place.x - place.width / 2, y: place.y - HEIGHT / 2,
      width: place.width, height: HEIGHT, rx: 5 }, svg);
  }

  function drawBox(svg, box, side) {
    const label = box.label[side];
    if (!label) return;
    const place = state.layout.node(box.id);
    const patterns = [...new Set(box.cells.map((cell) => cell.pattern).filter(Boolean))];
    const isChanged = patterns.length > 0;
    const isNew = side === "after" && box.cells.some((cell) => cell.after && cell.pattern);
    const isGone = !isChanged && box.cells.every((cell) => !cell.after);
    const group = el("g", {
      class: `node ${label.kind}${isChanged ? ` changed ${colour.get(patterns[patterns.length - 1]) || ""}` : ""}${isNew ? " came" : ""}${isGone ? " gone" : ""}`,
      transform: `translate(${(place.x - place.width / 2).toFixed(1)},${(place.y - HEIGHT / 2).toFixed(1)})`,
      "data-box": box.id, role: "img", "aria-label": `${label.title} ${label.type}`,
    }, svg);
    el("rect", { width: place.width, height: HEIGHT, rx: 5 }, group);
    el("text", { x: 9, y: label.type ? 16 : 23 }, group).textContent = label.title;
    if (label.type) el("text", { x: 9, y: 30, class: "type" }, group).textContent = label.type;
    if (!state.drawn.has(box.id)) state.drawn.set(box.id, []);
    state.drawn.get(box.id).push(group);
    group.addEventListener("pointerenter", (event) => showTip(box, side, event.clientX + 14, event.clientY + 18, event.clientY - 10));
    group.addEventListener("pointerleave", hideTip);
    group.addEventListener("click", () => select(box.id, false));
    group.addEventListener("dblclick", () => toggleOf(box));
  }

  // The whole graph in one strip, and on it the part that the panels show.
  function drawOverview() {
    const strip = at("overview");
    strip.replaceChildren();
    strip.setAttribute("viewBox", `0 0 ${state.size.width} ${state.size.height}`);
    for (const box of state.boxes.values()) {
      const place = state.layout.node(box.id), pattern = box.cells.map((cell) => cell.pattern).filter(Boolean).pop();
      el("rect", { class: pattern ? `changed ${colour.get(pattern) || ""}` : "", x: place.x - place.width / 2,
        y: place.y - HEIGHT / 2, width: place.width, height: HEIGHT }, strip);
    }
    state.frame = el("rect", { class: "frame" }, strip);
  }

  function linesOf(node) {
    const isInput = node.kind === "input";
    return [[isInput ? "input" : "op", node.title], ["value", node.name], ["form", node.type], [isInput ? "holds" : "writes", node.bytes],
      ["module", node.module], ["source", node.at], ["stands for", isInput ? "" : node.origins.join(", ")]].filter(([, text]) => text);
  }

  const hideTip = () => { at("tip").hidden = true; };

  // Below `y`, or above `top` where there is no room.
  function showTip(box, side, x, y, top) {
    const tip = at("tip");
    const node = box.fold === null ? box.cells[0][side] : null;
    const pattern = box.cells[0].pattern;
    tip.textContent = node
      ? [...linesOf(node), ...(pattern ? [["pattern", pattern]] : [])].map(([name, text]) => `${name}: ${text}`).join("\n")
      : `${box.fold}: ${box.label[side].type}. Double-click or Enter unfolds it.`;
    tip.hidden = false;
    tip.style.left = `${Math.max(4, Math.min(x, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(4, y + tip.offsetHeight > innerHeight ? top - tip.offsetHeight : y)}px`;
  }

  // At the selected node, in the panel that has the keys or else in the other one.
  function showTipOfSelected() {
    const first = SIDES.find((side) => at(side) === document.activeElement);
    if (first === undefined || state.selected === null) return hideTip();
    const group = [first, ...SIDES].map((side) => at(side).querySelector(`.node[data-box="${CSS.escape(state.selected)}"]`)).find(Boolean);
    const place = group.getBoundingClientRect();
    showTip(state.boxes.get(state.selected), group.ownerSVGElement.id, place.left, place.bottom + 8, place.top - 8);
  }

  function select(id, isMoved) {
    state.selected = id;
    for (const [box, groups] of state.drawn) for (const group of groups) group.classList.toggle("selected", box === id);
    for (const edge of document.querySelectorAll(".edge"))
      edge.classList.toggle("lit", id !== null && (edge.dataset.from === id || edge.dataset.to === id));
    const detail = at("detail");
    detail.replaceChildren(...(id === null ? [hint] : []));
    if (id === null) return;
    const box = state.boxes.get(id);
    const list = document.createElement("dl");
    const add = (name, text) => {
      const dt = document.createElement("dt"), dd = document.createElement("dd");
      dt.textContent = name; dd.textContent = text; list.append(dt, dd);
    };
    const module = box.fold === null ? moduleOf(box.cells[0]) : box.fold;
    if (box.fold !== null) add("module", `${box.fold}, ${box.cells.length} values`);
    else for (const side of SIDES) {
      const node = box.cells[0][side];
      add(side, node ? linesOf(node).map(([name, text]) => `${name} ${text}`).join(" · ") : "nothing");
    }
    if (box.cells[0].pattern) add("pattern", box.cells[0].pattern);
    detail.append(list);
    if (module) {
      const parts = module.split(".");
      parts.forEach((_, end) => {
        const name = parts.slice(0, end + 1).join(".");
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = `${state.folded.has(name) ? "Unfold" : "Fold"} ${name}`;
        button.addEventListener("click", () => toggle(name));
        detail.append(button, " ");
      });
    }
    if (isMoved) bringIntoView(id);
  }

  function toggle(name) {
    if (!state.folded.delete(name)) state.folded.add(name);
    draw();
    const box = [...state.boxes.values()].find((found) => found.fold === name);
    if (box) select(box.id, true);
    else clampView();
  }

  function toggleOf(box) {
    const name = box.fold === null ? moduleOf(box.cells[0]) : box.fold;
    if (name) toggle(name);
  }

  function drawChips() {
    at("modules").replaceChildren(...modulesOf(state.graph).map((name) => {
      const chip = document.createElement("button");
      chip.type = "button";
      chip.textContent = `${state.folded.has(name) ? "▸" : "▾"} ${name}`;
      chip.setAttribute("aria-pressed", String(state.folded.has(name)));
      chip.addEventListener("click", () => toggle(name));
      return chip;
    }));
  }

  function textOf(box) {
    const nodes = box.cells.flatMap((cell) => SIDES.map((side) => cell[side]).filter(Boolean));
    return [box.fold || "", ...nodes.map((node) => [node.title, node.name, node.type, node.module, node.at].join(" ")),
      ...box.cells.map((cell) => cell.pattern)].join(" ").toLowerCase();
  }

  function search() {
    const query = at("search").value.trim().toLowerCase();
    const hits = query ? [...state.boxes.values()].filter((box) => textOf(box).includes(query)) : [];
    for (const side of SIDES) at(side).classList.toggle("searching", query !== "");
    const found = new Set(hits.map((box) => box.id));
    for (const [id, groups] of state.drawn) for (const group of groups) group.classList.toggle("hit", found.has(id));
    at("found").textContent = query ? `${hits.length} found` : "";
    state.hits = hits.map((box) => box.id);
    return hits;
  }

  // One view box for both panels: they always show the same place.
  function setView(view) {
    state.view = view;
    for (const side of SIDES) at(side).setAttribute("viewBox", `${view.x} ${view.y} ${view.width} ${view.height}`);
    for (const name of ["x", "y", "width", "height"]) state.frame.setAttribute(name, view[name]);
  }

  const panelSize = () => { const panel = at("before").getBoundingClientRect(); return { width: panel.width || 600, height: panel.height || 400 }; };

  // The start of the graph, as large as shows the first op that came, in the middle of what is seen.
  function startView() {
    const panel = panelSize(), places = [...state.boxes.values()].map((box) => [box, state.layout.node(box.id)]);
    const ends = places.filter(([box]) => box.cells.some((cell) => cell.after && cell.pattern)).map(([, place]) => place.x + place.width / 2);
    const first = ends.length ? Math.min(...ends) + 16 : panel.width;
    const scale = Math.min(0.75, Math.max(0.5, panel.width / first));
    const width = panel.width / scale, height = panel.height / scale;
    const seen = places.map(([, place]) => place).filter((place) => place.x < width).map((place) => place.y);
    const middle = (Math.min(...seen) + Math.max(...seen)) / 2;
    const y = height >= state.size.height ? (state.size.height - height) / 2
      : Math.max(0, Math.min(state.size.height - height, middle - height / 2));
    setView({ x: 0, y, width, height });
  }

  function fit() {
    const panel = panelSize();
    const scale = Math.min(panel.width / state.size.width, panel.height / state.size.height);
    const width = panel.width / scale, height = panel.height / scale;
    setView({ x: (state.size.width - width) / 2, y: (state.size.height - height) / 2, width, height });
  }

  function clampView() {
    const view = state.view;
    const x = Math.max(Math.min(view.x, state.size.width - view.width / 2), -view.width / 2);
    const y = Math.max(Math.min(view.y, state.size.height - view.height / 2), -view.height / 2);
    setView({ ...view, x, y });
  }

  function zoom(factor, centre) {
    const view = state.view, x = centre ? centre.x : view.x + view.width / 2, y = centre ? centre.y : view.y + view.height / 2;
    const panel = panelSize(), most = Math.max(panel.width, state.size.width * 2);
    const width = Math.min(most, Math.max(panel.width / 4, view.width / factor)), ratio = width / view.width;
    setView({ x: x - (x - view.x) * ratio, y: y - (y - view.y) * ratio, width, height: view.height * ratio });
  }

  function bringIntoView(id) {
    const place = state.layout.node(id), view = state.view;
    const isShown = place.x - place.width / 2 >= view.x && place.x + place.width / 2 <= view.x + view.width &&
      place.y - HEIGHT / 2 >= view.y && place.y + HEIGHT / 2 <= view.y + view.height;
    if (!isShown) setView({ ...view, x: place.x - view.width / 2, y: place.y - view.height / 2 });
  }

  function walk(step) {
    const ids = [...state.boxes.keys()];
    if (state.selected === null) return select(ids[0], true);
    const here = state.layout.node(state.selected);
    const pick = (list) => list.filter((id) => id !== state.selected)
      .sort((a, b) => Math.abs(state.layout.node(a).y - here.y) - Math.abs(state.layout.node(b).y - here.y))[0];
    let next;
    if (step === "ArrowRight") next = pick(state.layout.successors(state.selected));
    else if (step === "ArrowLeft") next = pick(state.layout.predecessors(state.selected));
    else {
      const sign = step === "ArrowDown" ? 1 : -1;
      next = ids.filter((id) => (state.layout.node(id).y - here.y) * sign > 1)
        .sort((a, b) => distance(a, here) - distance(b, here))[0];
    }
    if (next !== undefined) select(next, true);
  }

  const distance = (id, here) => Math.hypot((state.layout.node(id).x - here.x) * 2, state.layout.node(id).y - here.y);

  for (const side of SIDES) {
    const svg = at(side);
    const toGraph = (event) => {
      const frame = svg.getBoundingClientRect();
      return { x: state.view.x + (event.clientX - frame.left) / frame.width * state.view.width,
        y: state.view.y + (event.clientY - frame.top) / frame.height * state.view.height };
    };
    let grabbed = null;
    svg.addEventListener("pointerdown", (event) => { grabbed = toGraph(event); svg.classList.add("dragged"); });
    svg.addEventListener("blur", hideTip);
    svg.addEventListener("pointermove", (event) => {
      if (!grabbed) return;
      const here = toGraph(event);
      setView({ ...state.view, x: state.view.x + grabbed.x - here.x, y: state.view.y + grabbed.y - here.y });
    });
    for (const name of ["pointerup", "pointerleave", "pointercancel"])
      svg.addEventListener(name, () => { grabbed = null; svg.classList.remove("dragged"); });
    svg.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2, toGraph(event));
    }, { passive: false });
    svg.addEventListener("keydown", (event) => {
      if (event.key.startsWith("Arrow")) walk(event.key);
      else if (event.key === "Enter" && state.selected !== null) toggleOf(state.boxes.get(state.selected));
      else if (event.key === "+" || event.key === "=") zoom(1.25);
      else if (event.key === "-") zoom(1 / 1.25);
      else if (event.key === "0") fit();
      else if (event.key === "Escape") select(null, false);
      else return;
      event.preventDefault();
      showTipOfSelected();
    });
  }
  addEventListener("scroll", showTipOfSelected, { passive: true }); // the page also scrolls to what gets the keys

  const strip = at("overview");
  const jump = (event) => {
    if (event.type === "pointermove" && !event.buttons) return;
    const frame = strip.getBoundingClientRect();
    const x = (event.clientX - frame.left) / frame.width * state.size.width;
    const y = (event.clientY - frame.top) / frame.height * state.size.height;
    setView({ ...state.view, x: x - state.view.width / 2, y: y - state.view.height / 2 });
  };
  strip.addEventListener("pointerdown", jump);
  strip.addEventListener("pointermove", jump);

  function show(place) {
    state.graph = data.graphs[place];
    state.folded = new Set();
    state.selected = null;
    draw();
    startView();
  }

  at("graph").addEventListener("change", (event) => show(Number(event.target.value)));
  at("search").addEventListener("input", search);
  let searchedFrom = null;
  at("search").addEventListener("focus", (event) => { searchedFrom = event.relatedTarget; });
  at("search").addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.preventDefault();
      at("search").value = "";
      search();
      (searchedFrom || at("before")).focus({ preventScroll: true });
      return;
    }
    if (event.key !== "Enter" || !state.hits.length) return;
    const next = state.hits[(state.hits.indexOf(state.selected) + 1) % state.hits.length];
    select(next, true);
  });
  at("zoom-in").addEventListener("click", () => zoom(1.25));
  at("zoom-out").addEventListener("click", () => zoom(1 / 1.25));
  at("fit").addEventListener("click", fit);
  at("unfold").addEventListener("click", () => { state.folded.clear(); draw(); });
  at("stack").addEventListener("click", (event) => {
    const isStacked = at("panels").classList.toggle("stacked");
    event.target.setAttribute("aria-pressed", String(isStacked));
    startView();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) {
      event.preventDefault();
      at("search").focus();
    }
  });
  // What is printed is what is shown: the graph that was chosen, folded as it is.
  function fillSheets() {
    const nodes = [...state.boxes.keys()].map((id) => state.layout.node(id)).map(({ x, y, width }) =>
      ({ left: x - width / 2, right: x + width / 2, top: y - HEIGHT / 2, bottom: y + HEIGHT / 2 }));
    const bends = state.layout.edges().flatMap((edge) => state.layout.edge(edge).points)
      .map(({ x, y }) => ({ left: x, right: x, top: y, bottom: y }));
    const title = document.createElement("h3");
    title.textContent = `${at("graph").selectedOptions[0].textContent.trim()}: before, and below it after`;
    at("sheets").replaceChildren(title, ...paper.sheetsOf(SIDES.map(at), nodes, [...nodes, ...bends], state.size.width));
  }

  addEventListener("beforeprint", () => {
    fillSheets();
    for (const closed of document.querySelectorAll("details:not(.guards)")) closed.open = true;
  });
  addEventListener("afterprint", () => at("sheets").replaceChildren());
  addEventListener("resize", () => {
    const panel = panelSize();
    setView({ ...state.view, height: state.view.width * panel.height / panel.width });
  });
  show(0);
})();
