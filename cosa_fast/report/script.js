"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const one = (selector, root = document) => root.querySelector(selector);
  document.documentElement.classList.add("script");

  // Links within the page work without its address: inside another report it may have none.
  const links = all('a[href^="#"]');
  for (const link of links) {
    link.addEventListener("click", (event) => {
      const target = document.getElementById(link.getAttribute("href").slice(1));
      if (!target) return;
      event.preventDefault();
      target.scrollIntoView();
      target.focus({ preventScroll: true });
    });
  }

  // The section being read is marked in the navigation.
  const places = all("nav a").map((link) => [link, document.getElementById(link.getAttribute("href").slice(1))]);
  let waiting = false;
  const mark = () => {
    waiting = false;
    const passed = places.filter(([, section]) => section.getBoundingClientRect().top < innerHeight / 3);
    const current = passed.length ? passed[passed.length - 1][0] : null;
    for (const [link] of places) {
      if (link !== current) link.removeAttribute("aria-current");
      else if (!link.hasAttribute("aria-current")) {
        link.setAttribute("aria-current", "true");
        const bar = one("nav");
        bar.scrollLeft = link.offsetLeft - (bar.clientWidth - link.offsetWidth) / 2;
      }
    }
  };
  addEventListener("scroll", () => { if (!waiting) { waiting = true; requestAnimationFrame(mark); } }, { passive: true });

  // Sorting: numbers fall first, words rise first, the third click gives the original order; empty cells stay last.
  for (const table of all("table.sortable")) {
    const body = one("tbody.rows", table);
    const original = [...body.rows];
    const heads = all("thead th", table);
    heads.forEach((head, column) => one("button", head).addEventListener("click", () => {
      const text = (row) => row.cells[column].textContent.trim();
      const filled = original.filter((row) => text(row) !== "");
      const numeric = filled.every((row) => Number.isFinite(Number(text(row))));
      const [first, second] = numeric ? ["descending", "ascending"] : ["ascending", "descending"];
      const now = head.getAttribute("aria-sort");
      const next = now === "none" ? first : now === first ? second : "none";
      for (const other of heads) other.setAttribute("aria-sort", other === head ? next : "none");
      if (next === "none") return body.append(...original);
      const sign = next === "ascending" ? 1 : -1;
      const order = numeric
        ? (a, b) => Number(text(a)) - Number(text(b))
        : (a, b) => text(a).localeCompare(text(b));
      filled.sort((a, b) => sign * order(a, b));
      body.append(...filled, ...original.filter((row) => text(row) === ""));
    }));
  }

  const split = one("#split");
  if (split) {
    const choose = () => all(".split").forEach((part) => { part.hidden = part.dataset.split !== split.value; });
    split.addEventListener("change", choose);
    choose();
  }

  const viewer = one(".viewer");
  if (viewer) {
    const samples = all(".sample");
    const buttons = all(".layers button", viewer);
    const stage = one(".stage", viewer), picture = one(".picture", viewer), about = one(".about", viewer);
    const tag = one("#tag");
    let shown = samples, place = 0, layer = buttons[0];

    const show = () => {
      const sample = shown[place];
      for (const other of samples) other.hidden = other !== sample;
      const images = new Map(all("img", sample).map((image) => [image.dataset.layer, image]));
      for (const button of buttons) {
        button.disabled = !images.has(button.dataset.layer);
        button.setAttribute("aria-pressed", String(button === layer));
      }
      const image = images.get(layer.dataset.layer);
      picture.hidden = !image;
      if (image) {
        picture.src = image.src;
        picture.alt = image.alt;
        picture.classList.toggle("map", image.classList.contains("map"));
      }
      for (const item of all(".strip li", sample)) item.classList.toggle("shown", one("img", item) === image);
      about.textContent = layer.dataset.about;
      one(".place", viewer).textContent = `${place + 1} of ${shown.length}`;
      one(".previous", viewer).disabled = one(".next", viewer).disabled = shown.length < 2;
    };
    const step = (by) => { place = (place + by + shown.length) % shown.length; show(); };
    const choose = (button) => { if (button && !button.disabled) { layer = button; show(); } };

    one(".previous", viewer).addEventListener("click", () => step(-1));
    one(".next", viewer).addEventListener("click", () => step(1));
    for (const button of buttons) button.addEventListener("click", () => choose(button));
    for (const item of all(".strip li")) {
      item.addEventListener("click", () => choose(buttons.find((b) => b.dataset.layer === one("img", item).dataset.layer)));
    }
    tag.addEventListener("change", () => {
      shown = samples.filter((sample) => !tag.value || sample.dataset.tags.split("\n").includes(tag.value));
      place = 0;
      show();
    });
    addEventListener("keydown", (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
      if (event.target.closest("input, select, textarea, .scroll")) return;
      const box = viewer.getBoundingClientRect();
      if (box.bottom < 0 || box.top > innerHeight) return;
      if (event.key === "ArrowRight") step(1);
      else if (event.key === "ArrowLeft") step(-1);
      else if (event.key >= "1" && event.key <= "9") choose(buttons[Number(event.key) - 1]);
      else return;
      event.preventDefault();
    });
    let start = null;
    stage.addEventListener("touchstart", (event) => {
      start = event.touches.length === 1 ? event.touches[0] : null;
    }, { passive: true });
    stage.addEventListener("touchend", (event) => {
      if (!start) return;
      const end = event.changedTouches[0], x = end.clientX - start.clientX, y = end.clientY - start.clientY;
      if (Math.abs(x) > 40 && Math.abs(x) > 1.5 * Math.abs(y)) step(x < 0 ? 1 : -1);
      start = null;
    });
    show();
  }
})();
