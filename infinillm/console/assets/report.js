// What marks and heat maps say when they are pointed at.
(() => {
  const tip = document.getElementById("tip");
  const read = new Map();
  const about = (map) => {
    if (!read.has(map)) {
      const found = JSON.parse(map.dataset.heat);
      found.values = Uint8Array.from(atob(found.values), (letter) => letter.charCodeAt(0));
      read.set(map, found);
    }
    return read.get(map);
  };
  const cell = (map, event) => {
    const { names, columns, values, most, unit, joint } = about(map);
    const box = map.getBoundingClientRect();
    const at = (share, count) => Math.max(0, Math.min(count - 1, Math.floor(share * count)));
    const column = at((event.clientX - box.left) / box.width, columns.length);
    const row = at((event.clientY - box.top) / box.height, names.length);
    const value = (values[row * columns.length + column] / 255) * most;
    return `${names[row]}${joint}${columns[column]}: ${value >= 10 ? value.toFixed(0) : value.toPrecision(2)} ${unit}`;
  };
  addEventListener("pointermove", (event) => {
    const mark = event.target.closest("[data-tip], [data-heat]");
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.dataset.tip ?? cell(mark, event);
    const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    const below = event.clientY + 18;
    const y = below + tip.offsetHeight < innerHeight ? below : event.clientY - tip.offsetHeight - 10;
    tip.style.transform = `translate(${x}px, ${y}px)`;
  });
})();
