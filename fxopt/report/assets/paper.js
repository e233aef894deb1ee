"use strict";
// A graph on paper, where nothing scrolls: cut into strips that can be read, each before above after.
const paper = (() => {
  const WIDTH = 1250, MARGIN = 14;

  // From where to where each strip goes; no box is cut through.
  function spansOf(boxes, width) {
    const spans = [];
    for (let start = 0; start < width;) {
      let end = Math.min(start + WIDTH, width);
      for (let through = [1]; through.length && end > start;) {
        through = boxes.filter((box) => box.left < end && box.right > end);
        end = Math.min(end, ...through.map((box) => box.left - 1));
      }
      if (end <= start) end = Math.min(start + WIDTH, width);
      spans.push([start, end]);
      start = end;
    }
    return spans;
  }

  function stripOf(svg, [start, end], seen) {
    const strip = svg.cloneNode(true), heights = seen.flatMap((box) => [box.top, box.bottom]);
    const top = Math.min(...heights) - MARGIN, height = Math.max(...heights) + MARGIN - top;
    for (const name of ["id", "tabindex", "role"]) strip.removeAttribute(name);
    strip.setAttribute("class", "strip");
    strip.setAttribute("viewBox", `${start} ${top} ${end - start} ${height}`);
    strip.style.width = `${100 * (end - start) / WIDTH}%`;
    return strip;
  }

  // `boxes` are the nodes and the bends of lines: of each its left, right, top and bottom.
  function sheetsOf(svgs, nodes, boxes, width) {
    return spansOf(nodes, width).map((span) => {
      const seen = boxes.filter((box) => box.right >= span[0] && box.left <= span[1]);
      const sheet = document.createElement("div");
      sheet.className = "sheet";
      for (const svg of svgs) sheet.append(stripOf(svg, span, seen));
      return sheet;
    });
  }

  return { sheetsOf };
})();
