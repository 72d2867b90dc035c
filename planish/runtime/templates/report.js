"use strict";
// Draws the nodes of a block when it is opened. Names are set as text, never as markup.
(function () {
  const source = document.getElementById("graph");
  if (!source) return;
  const graph = JSON.parse(source.textContent);
  const KEPT = -1, GONE = -2, CHUNK = 500;

  function element(tag, name, text) {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function item(node, left) {
    const [op, name, mark] = node;
    const row = element("li", mark === KEPT ? "" : mark === GONE ? (left ? "gone" : "") : "made");
    if (mark >= 0 && graph.hues[mark] !== null) row.style.setProperty("--h", graph.hues[mark]);
    row.append(element("i", "dot"), element("b", "", graph.ops[op]), element("span", "name", name));
    if (mark >= 0) row.append(element("em", "", graph.passes[mark]));
    row.title = name + (mark >= 0 ? (left ? ", replaced by " : ", made by ") + graph.passes[mark] : mark === GONE ? ", removed" : "");
    return row;
  }

  function side(title, nodes, hidden, left) {
    const box = element("div", "side");
    box.append(element("h3", "", title + " · " + (nodes.length + hidden)));
    const list = element("ol");
    let shown = 0;
    function more() {
      const part = document.createDocumentFragment();
      for (const node of nodes.slice(shown, shown + CHUNK)) part.append(item(node, left));
      shown += CHUNK;
      list.append(part);
    }
    more();
    box.append(list);
    if (nodes.length > shown) {
      const button = element("button", "", "show more");
      button.type = "button";
      button.addEventListener("click", function () { more(); if (shown >= nodes.length) button.remove(); });
      box.append(button);
    }
    if (hidden) box.append(element("p", "idle", "and " + hidden + " more nodes, not listed"));
    if (!nodes.length && !hidden) box.append(element("p", "idle", "none"));
    return box;
  }

  document.querySelectorAll("details[data-block]").forEach(function (details) {
    details.addEventListener("toggle", function () {
      const target = details.querySelector(".sides");
      if (!details.open || target.childElementCount) return;
      const [before, after, moreBefore, moreAfter] = graph.blocks[Number(details.dataset.block)];
      target.append(side("before", before, moreBefore, true), side("after", after, moreAfter, false));
    });
  });
})();
