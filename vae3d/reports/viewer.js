// Linked planes of input, reconstruction and error; see viewer.py. No library, no network.
"use strict";
(() => {
const COLUMNS = ["input", "recon", "error"];
const waiting = {};  // what takes a volume from a file beside the page, by case
window.vae3dVolume = data => waiting[data.case](data);

const make = (tag, of = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), of);
  node.append(...children);
  return node;
};
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

async function unpacked(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

class Viewer {
  constructor(root, data, input, recon) {
    Object.assign(this, {root, data, input, recon});
    [this.channels, ...this.size] = data.shape;
    this.colored = data.colors.map((c, i) => c ? i : -1).filter(i => i >= 0);
    this.planes = data.planes.map(([name, axis]) => this.plane(name, axis));
    this.readout = make("output", {className: "values"});
    this.controls = make("div", {className: "controls"});
    const aside = make("div", {className: "aside"}, this.readout, this.controls);
    root.replaceChildren(this.grid(), aside);
    this.reset();
  }

  // ---- what is shown -----------------------------------------------------------------------------

  reset() {
    const {data} = this;
    this.cursor = data.center.slice();
    [this.low, this.high] = [0, 255];
    this.errorEnd = data.errorScale;
    this.mirrored = data.mirrored;
    this.shown = this.colored.length ? this.colored : [0];
    this.fill();
    this.update();
  }

  plane(name, axis) {
    const [a, b] = [0, 1, 2].filter(i => i !== axis), {spacing} = this.data;
    return {name, axis, a, b, width: this.size[a] * spacing[a], height: this.size[b] * spacing[b]};
  }

  offset(channel, at) {
    const [x, y, z] = this.size;
    return ((channel * x + at[0]) * y + at[1]) * z + at[2];
  }

  // Value of a stored number in the file's unit; differences have no offset.
  value(channel, stored) {
    const [low, high] = this.data.ranges[channel];
    return low + stored / 255 * (high - low);
  }

  // Where a pixel of a plane lies in the volume.
  place(plane, column, row) {
    const at = this.cursor.slice();
    at[plane.a] = this.mirrored ? this.size[plane.a] - 1 - column : column;
    at[plane.b] = this.data.downward ? row : this.size[plane.b] - 1 - row;
    return at;
  }

  tables() {
    const gray = new Float32Array(256), error = new Uint8ClampedArray(511 * 3);
    const span = Math.max(this.high - this.low, 1e-6), anchors = this.data.errorColors;
    for (let v = 0; v < 256; v++) gray[v] = clamp((v - this.low) / span, 0, 1) * 255;
    for (let e = -255; e <= 255; e++) {
      const at = (clamp(e / 255 / this.errorEnd, -1, 1) + 1) / 2 * (anchors.length - 1);
      const k = Math.min(Math.floor(at), anchors.length - 2), share = at - k;
      for (let c = 0; c < 3; c++)
        error[(e + 255) * 3 + c] = anchors[k][c] + (anchors[k + 1][c] - anchors[k][c]) * share;
    }
    return {gray, error};
  }

  // Column by column and row by row the volume is walked in steps of its own strides.
  paint(plane, column, {gray, error}) {
    const width = this.size[plane.a], height = this.size[plane.b];
    const strides = [this.size[1] * this.size[2], this.size[2], 1];
    const right = strides[plane.a] * (this.mirrored ? -1 : 1);
    const below = strides[plane.b] * (this.data.downward ? 1 : -1);
    const starts = this.shown.map(c => this.offset(c, this.place(plane, 0, 0)));
    const pixels = new ImageData(width, height), out = pixels.data;
    const inks = this.shown.map(c => this.shown.length > 1 ? this.data.colors[c] : "ffffff")
      .map(c => [0, 2, 4].map(i => parseInt(c.slice(i, i + 2), 16) / 255));
    const source = column === "recon" ? this.recon : this.input;
    for (let row = 0, to = 0; row < height; row++) for (let x = 0; x < width; x++, to += 4) {
      let worst = 0, r = 0, g = 0, b = 0;
      for (let n = 0; n < inks.length; n++) {
        const from = starts[n] + x * right + row * below;
        if (column === "error") {
          const off = this.recon[from] - this.input[from];
          if (Math.abs(off) > Math.abs(worst)) worst = off;
        } else {
          const v = gray[source[from]];
          r += v * inks[n][0]; g += v * inks[n][1]; b += v * inks[n][2];
        }
      }
      if (column === "error") {
        const k = (worst + 255) * 3;
        r = error[k]; g = error[k + 1]; b = error[k + 2];
      }
      out[to] = r; out[to + 1] = g; out[to + 2] = b; out[to + 3] = 255;
    }
    return pixels;
  }

  update() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => {
      const tables = this.tables();
      for (const plane of this.planes) {
        COLUMNS.forEach((column, k) => {
          const {canvas, across, down, sides} = plane.panels[k];
          canvas.getContext("2d").putImageData(this.paint(plane, column, tables), 0, 0);
          const [x, y] = this.pixel(plane);
          across.style.top = `${(y + .5) / canvas.height * 100}%`;
          down.style.left = `${(x + .5) / canvas.width * 100}%`;
          const letters = plane.name === "sagittal" ? ["P", "A"] : ["L", "R"];
          if (this.mirrored) letters.reverse();
          sides.forEach((side, n) => side.textContent = this.data.body ? letters[n] : "");
        });
        plane.label.textContent = this.size[plane.axis] > 1
          ? `${plane.name} ${"xyz"[plane.axis]} ${this.cursor[plane.axis]}` : plane.name;
      }
      this.tell(this.cursor);
      for (const refresh of this.refreshes) refresh();
    });
  }

  pixel(plane) {
    const [x, y] = [this.cursor[plane.a], this.cursor[plane.b]];
    return [this.mirrored ? this.size[plane.a] - 1 - x : x,
            this.data.downward ? y : this.size[plane.b] - 1 - y];
  }

  tell(at) {
    const {ranges, values, names} = this.data;
    const place = at.map((i, axis) => this.size[axis] > 1 ? `${"xyz"[axis]} ${i}` : "").join(" ");
    this.readout.replaceChildren(make("span", {textContent: place.trim()}),
      ...this.shown.map(c => {
        const from = this.offset(c, at), a = this.input[from], b = this.recon[from];
        const step = (ranges[c][1] - ranges[c][0]) / 255;
        const digits = clamp(-Math.floor(Math.log10(Math.abs(step))), 0, 9);
        const off = (b - a) * step;
        const number = v => v.toFixed(digits).replace("-", "\u2212");
        const name = this.channels > 1 ? `${names[c]}: ` : "", unit = values && ` ${values}`;
        return make("span", {textContent: `${name}input ${number(this.value(c, a))}  ` +
          `recon ${number(this.value(c, b))}  error ${off > 0 ? "+" : ""}${number(off)}${unit}`});
      }));
  }

  // ---- panels ------------------------------------------------------------------------------------

  grid() {
    const widest = Math.max(...this.planes.map(p => p.width));
    const high = this.planes.reduce((sum, p) => sum + p.height, 0);
    const grid = make("div", {className: "planes"});
    grid.style.maxWidth = `${3 * clamp(Math.round(680 * widest / high), 150, 360)}px`;
    for (const plane of this.planes) {
      plane.label = make("b");
      grid.append(...COLUMNS.map((name, k) => make("div", {className: "name"},
        ...(k ? [] : [plane.label]), make("span", {textContent: ` ${name}`}))));
      plane.panels = COLUMNS.map(name => this.panel(plane, name, widest));
      grid.append(...plane.panels.map(panel => panel.cell));
    }
    return grid;
  }

  panel(plane, name, widest) {
    const canvas = make("canvas", {width: this.size[plane.a], height: this.size[plane.b],
                                   tabIndex: 0});
    canvas.dataset.column = name;
    canvas.dataset.plane = plane.name;
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-label", `${plane.name} plane of the ${name}: arrows move the cursor, ` +
      "page up and down the slice, brackets the window");
    const [across, down] = ["across", "down"].map(c => make("i", {className: c}));
    const sides = ["left", "right"].map(c => make("span", {className: `side ${c}`}));
    const box = make("div", {className: "panel"}, canvas, across, down, ...sides);
    box.style.width = `${plane.width / widest * 100}%`;
    box.style.aspectRatio = `${plane.width} / ${plane.height}`;
    this.listen(canvas, plane);
    return {canvas, across, down, sides, cell: make("div", {className: "cell"}, box)};
  }

  listen(canvas, plane) {
    const at = event => {
      const box = canvas.getBoundingClientRect();
      const x = Math.floor((event.clientX - box.left) / box.width * canvas.width);
      const y = Math.floor((event.clientY - box.top) / box.height * canvas.height);
      return this.place(plane, clamp(x, 0, canvas.width - 1), clamp(y, 0, canvas.height - 1));
    };
    let drag = null;
    canvas.addEventListener("pointerdown", event => {
      canvas.setPointerCapture(event.pointerId);
      canvas.focus({preventScroll: true});
      const windowing = event.button === 2 || event.shiftKey;
      drag = windowing ? {x: event.clientX, y: event.clientY, low: this.low, high: this.high} : {};
      if (!windowing) this.move(at(event));
    });
    canvas.addEventListener("pointermove", event => {
      if (!drag) return this.tell(at(event));
      if (drag.x === undefined) return this.move(at(event));
      const wider = (event.clientX - drag.x) / 2, up = (drag.y - event.clientY) / 2;
      this.window(drag.low - wider - up, drag.high + wider - up);
    });
    for (const kind of ["pointerup", "pointercancel"])
      canvas.addEventListener(kind, () => drag = null);
    canvas.addEventListener("pointerleave", () => drag || this.tell(this.cursor));
    canvas.addEventListener("contextmenu", event => event.preventDefault());
    let turned = 0;
    canvas.addEventListener("wheel", event => {
      if (event.ctrlKey) return;  // the page's own zoom
      turned += Math.abs(event.deltaY) >= 40 ? Math.sign(event.deltaY) * 40 : event.deltaY;
      const steps = Math.trunc(turned / 40) * (this.data.body ? -1 : 1);
      const moved = this.slice(plane.axis, steps);
      turned %= 40;
      if (moved || !steps) event.preventDefault();  // at its end the page scrolls on
    }, {passive: false});
    canvas.addEventListener("keydown", event => this.key(event, plane));
  }

  key(event, plane) {
    const right = this.mirrored ? -1 : 1, up = this.data.downward ? -1 : 1;
    const wide = (this.high - this.low) * .05;
    const does = {
      ArrowRight: () => this.step(plane.a, right), ArrowLeft: () => this.step(plane.a, -right),
      ArrowUp: () => this.step(plane.b, up), ArrowDown: () => this.step(plane.b, -up),
      PageUp: () => this.step(plane.axis, 1), PageDown: () => this.step(plane.axis, -1),
      "[": () => this.window(this.low + wide, this.high - wide),
      "]": () => this.window(this.low - wide, this.high + wide),
      Home: () => this.reset(),
    }[event.key];
    if (!does || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    does();
  }

  // ---- what can be changed -----------------------------------------------------------------------

  move(at) { this.cursor = at; this.update(); }

  step(axis, by) { this.slice(axis, by); }

  slice(axis, by) {
    const to = clamp(this.cursor[axis] + by, 0, this.size[axis] - 1);
    if (to === this.cursor[axis]) return false;
    this.cursor[axis] = to;
    this.update();
    return true;
  }

  window(low, high) {
    const middle = clamp((low + high) / 2, 0, 255), half = clamp((high - low) / 2, 1, 255);
    [this.low, this.high] = [middle - half, middle + half];
    this.update();
  }

  fill() {
    const [first] = this.shown, {values, body} = this.data;
    const shown = v => `${+this.value(first, v).toPrecision(4)}${values && ` ${values}`}`;
    const span = Math.abs(this.data.ranges[first][1] - this.data.ranges[first][0]);
    this.refreshes = [];
    const rows = this.planes.filter(p => this.size[p.axis] > 1).map(plane => this.slider(
      plane.name, [0, this.size[plane.axis] - 1, 1], () => this.cursor[plane.axis],
      v => { this.cursor[plane.axis] = v; }, v => `${"xyz"[plane.axis]} ${v}`));
    rows.push(
      this.slider("black", [-128, 382, 1], () => this.low,
        v => { this.low = Math.min(v, this.high - 1); }, shown),
      this.slider("white", [-127, 383, 1], () => this.high,
        v => { this.high = Math.max(v, this.low + 1); }, shown),
      this.slider("error", [.01, 1, .01], () => this.errorEnd, v => { this.errorEnd = v; },
        v => `\u00b1 ${+(v * span).toPrecision(3)}${values && ` ${values}`}`));
    if (this.channels > 1) rows.push(this.choice());
    if (body) rows.push(this.tick("R on the left", () => this.mirrored,
                                  on => { this.mirrored = on; }));
    rows.push(this.tick("lines", () => !this.root.classList.contains("plain"),
                        on => this.root.classList.toggle("plain", !on)));
    rows.push(make("button", {type: "button", textContent: "reset", onclick: () => this.reset()}));
    this.controls.replaceChildren(...rows);
  }

  slider(name, [min, max, step], get, set, text) {
    const input = make("input", {type: "range", min, max, step}), out = make("output");
    input.addEventListener("input", () => { set(+input.value); this.update(); });
    this.refreshes.push(() => { input.value = get(); out.textContent = text(get()); });
    return make("label", {className: "slider"}, make("span", {textContent: name}), input, out);
  }

  tick(name, get, set) {
    const input = make("input", {type: "checkbox"});
    input.addEventListener("change", () => { set(input.checked); this.update(); });
    this.refreshes.push(() => { input.checked = get(); });
    return make("label", {}, input, ` ${name}`);
  }

  choice() {
    const all = this.colored.length ? [["merged", this.colored]] : [];
    const options = [...all, ...this.data.names.map((name, c) => [name, [c]])];
    const input = make("select", {}, ...options.map(([name]) => make("option", {textContent: name})));
    input.selectedIndex = options.findIndex(([, c]) => String(c) === String(this.shown));
    input.addEventListener("change", () => {
      this.shown = options[input.selectedIndex][1];
      this.fill();
      this.update();
    });
    return make("label", {}, "channel ", input);
  }
}

// ---- volumes become viewers when they are seen, those beside the page when they are asked for ----

async function open(root, data) {
  try {
    const [input, recon] = await Promise.all([data.input, data.recon].map(unpacked));
    root.viewer = new Viewer(root, data, input, recon);
  } catch (error) {
    root.textContent = `The viewer needs a newer browser (${error.message}); see the pictures.`;
  }
}

const seen = new IntersectionObserver(entries => {
  for (const {target, isIntersecting} of entries) if (isIntersecting) {
    seen.unobserve(target);
    open(target, JSON.parse(target.querySelector("script").textContent));
  }
}, {rootMargin: "200px"});

for (const root of document.querySelectorAll(".viewer")) {
  if (root.querySelector("script")) { seen.observe(root); continue; }
  const {src, name, size} = root.dataset;
  const button = make("button", {type: "button", textContent: `Look through the volume (${size})`});
  button.onclick = () => {
    button.disabled = true;
    waiting[name] = data => open(root, data);
    const script = make("script", {src});
    script.onerror = () => root.textContent = `${src} is not beside this page.`;
    document.head.append(script);
  };
  root.append(button);
}
})();
