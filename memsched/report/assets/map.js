// The model's arrays as cells as large as they are, layer by layer in the order of the program.

const MAPPED = new Set(['weight', 'cache', 'feature']);
const TITLE_HEIGHT = 15;

// What the codecs of the plans look like, in their order: lines of a square that repeats. After
// the last one they begin again, thicker.
const SQUARE = 8;
const PATTERNS = [
  'M-2 2L2 -2M0 8L8 0M6 10L10 6', 'M0 4H8', 'M-2 6L2 10M0 0L8 8M6 -2L10 2', 'M4 0V8',
  'M0 4H8M4 0V8', 'M0 8L8 0M0 0L8 8', 'M3.9 4H4.1', 'M0 6L4 2L8 6',
];
const CODECS = [...new Set(data.chapters.flatMap(({ arrays }) => arrays.codec))]
  .map(textOf).filter((codec) => codec !== 'raw');

// A filling for the cells of a codec, to lie over their colour.
function patternOf(context, codec) {
  const place = CODECS.indexOf(codec);
  const tile = document.createElement('canvas');
  tile.width = tile.height = Math.round(SQUARE * (window.devicePixelRatio || 1));
  const scale = tile.width / SQUARE;
  const drawn = tile.getContext('2d');
  drawn.scale(scale, scale);
  drawn.strokeStyle = color('label');
  drawn.lineWidth = 1.25 * (1 + Math.floor(place / PATTERNS.length));
  drawn.lineCap = 'square';
  drawn.stroke(new Path2D(PATTERNS[place % PATTERNS.length]));
  const pattern = context.createPattern(tile, 'repeat');
  pattern.setTransform(new DOMMatrix().scale(1 / scale));
  return pattern;
}

// How a row is coloured, and what that means.
function mapClass(chapter, row) {
  const { arrays } = chapter;
  const role = textOf(arrays.role[row]);
  const tier = textOf(arrays.tier[row]);
  const kind = textOf(arrays.kind[row]);
  if (role === 'unread') return ['unread', 'not read here'];
  if (role === 'spilled') return ['spilled', `moved out to ${tier} and back`];
  if (kind === 'cache') return ['cache', 'cache, on the device'];
  if (kind === 'feature') return ['features', 'features, on the device'];
  if (role === 'pinned') return ['pinned', 'stays on the device'];
  return tier === 'host' ? ['host', 'comes from host'] : ['nvme', `comes from ${tier}`];
}

// "layers.12" of "language_model.layers.12.mlp.down_proj": up to the first number, or two words.
function groupOf(name) {
  const words = name.split('.');
  const number = words.findIndex((word) => /^(\d+|\*)$/.test(word));
  const end = number > 0 && number < words.length - 1 ? number + 1 : Math.min(2, words.length - 1);
  return words.slice(0, Math.max(1, end)).join('.');
}

// Rectangles with areas as the sizes, in order, in strips along the shorter way. Each strip takes
// more items as long as that makes its cells more like squares.
function strips(sizes, box) {
  const total = sizes.reduce((sum, one) => sum + one, 0);
  const cells = [];
  let { x, y, w, h } = box;
  const scale = total ? (w * h) / total : 0;
  let first = 0;
  const worst = (from, to, length) => {
    let sum = 0;
    for (let n = from; n < to; n += 1) sum += sizes[n] * scale;
    const thick = sum / length;
    let found = 0;
    for (let n = from; n < to; n += 1) {
      const long = (sizes[n] * scale) / thick;
      found += Math.max(long / thick, thick / long);
    }
    return [found / (to - from), thick];
  };
  while (first < sizes.length) {
    const across = h > w;
    const length = Math.max(1e-6, across ? w : h);
    let after = first + 1;
    let [shape, thick] = worst(first, after, length);
    while (after < sizes.length) {
      const [next, wider] = worst(first, after + 1, length);
      if (next > shape) break;
      [shape, thick, after] = [next, wider, after + 1];
    }
    let at = 0;
    for (let n = first; n < after; n += 1) {
      const long = (sizes[n] * scale) / thick;
      cells.push(across ? { x: x + at, y, w: long, h: thick } : { x, y: y + at, w: thick, h: long });
      at += long;
    }
    if (across) { y += thick; h -= thick; } else { x += thick; w -= thick; }
    first = after;
  }
  return cells;
}

class ArrayMap {
  constructor(chapter) {
    this.chapter = chapter;
    this.chosen = null;
    this.found = () => true;
    const { arrays } = chapter;
    const groups = new Map();
    arrays.name.forEach((name, row) => {
      if (!MAPPED.has(textOf(arrays.kind[row])) || arrays.nbytes[row] === 0) return;
      const group = groupOf(textOf(name));
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push(row);
    });
    this.groups = [...groups];
    this.cells = [];
    this.swatches = [];
    this.canvas = element('canvas', {
      class: 'map', tabindex: '0', role: 'application', 'aria-roledescription': 'map',
      'aria-label': `Map of ${plural(this.groups.flatMap(([, rows]) => rows).length, 'array')}: use the arrow keys`,
      pointermove: (event) => this._pointer(event), pointerdown: (event) => this._pointer(event),
      pointerleave: hideTip, keydown: (event) => this._key(event),
      blur: () => { this.chosen = null; hideTip(); this.draw(); },
    });
    this.root = element('section', { class: 'part', 'aria-label': 'Map of the arrays' },
      element('h2', {}, 'Where the arrays are'),
      element('p', { class: 'soft small' }, 'A cell for each weight, cache and feature, as large as '
        + 'its bytes, layer by layer. The colour is where it comes from, the pattern its codec; raw '
        + 'has none.'),
      this._legend(), this.canvas);
  }

  _legend() {
    const { arrays } = this.chapter;
    const sums = new Map();
    for (const row of this.groups.flatMap(([, rows]) => rows)) {
      const [shade, words] = mapClass(this.chapter, row);
      const codec = textOf(arrays.codec[row]);
      const key = codec === 'raw' ? words : `${words}, as ${codec}`;
      const known = sums.get(key) ?? { shade, codec, nbytes: 0, many: 0 };
      known.nbytes += arrays.nbytes[row];
      known.many += arrays.count[row];
      sums.set(key, known);
    }
    return element('ul', { class: 'legend' }, ...[...sums].map(
      ([words, { shade, codec, nbytes, many }]) => element('li', {}, this._swatch(shade, codec),
        `${words}: `, figure(nbytes, size(nbytes)), ` in ${plural(many, 'array')}`)));
  }

  // A piece of a cell, drawn with the map.
  _swatch(shade, codec) {
    if (codec === 'raw') return swatch(`var(--${shade})`);
    const canvas = element('canvas', { class: 'swatch pattern', 'aria-hidden': 'true',
      'data-codec': codec });
    this.swatches.push({ canvas, shade, codec });
    return canvas;
  }

  draw() {
    const { context, width, height } = prepare(this.canvas);
    const { arrays } = this.chapter;
    const shades = {};
    this.patterns = Object.fromEntries(CODECS.map((codec) => [codec, patternOf(context, codec)]));
    for (const { canvas, shade, codec } of this.swatches) this._drawSwatch(canvas, shade, codec);
    const sums = this.groups.map(([, rows]) => rows.reduce((sum, row) => sum + arrays.nbytes[row], 0));
    this.cells = [];
    strips(sums, { x: 0, y: 0, w: width, h: height }).forEach((box, place) => {
      const [group, rows] = this.groups[place];
      const gap = Math.min(3, box.w / 6, box.h / 6);
      const inner = { x: box.x + gap / 2, y: box.y + gap / 2, w: box.w - gap, h: box.h - gap };
      const titled = inner.w > 46 && inner.h > 44;
      if (titled) { inner.y += TITLE_HEIGHT; inner.h -= TITLE_HEIGHT; }
      strips(rows.map((row) => arrays.nbytes[row]), inner).forEach((cell, n) => {
        const [shade] = mapClass(this.chapter, rows[n]);
        shades[shade] ??= color(shade);
        this._drawCell(context, cell, shades[shade], rows[n]);
        this.cells.push({ ...cell, row: rows[n] });
      });
      if (titled) this._drawTitle(context, group, inner);
    });
    if (this.chosen !== null) {
      const cell = this.cells[this.chosen];
      context.strokeStyle = color('focus');
      context.lineWidth = 3;
      context.strokeRect(cell.x, cell.y, cell.w, cell.h);
    }
  }

  _drawCell(context, cell, shade, row) {
    const edge = Math.min(1, cell.w / 4, cell.h / 4);
    context.globalAlpha = this.found(row) ? 1 : 0.18;
    context.fillStyle = shade;
    context.fillRect(cell.x, cell.y, cell.w - edge, cell.h - edge);
    const codec = textOf(this.chapter.arrays.codec[row]);
    if (codec !== 'raw') {
      context.fillStyle = this.patterns[codec];
      context.fillRect(cell.x, cell.y, cell.w - edge, cell.h - edge);
    }
    context.globalAlpha = 1;
  }

  _drawSwatch(canvas, shade, codec) {
    const { context, width, height } = prepare(canvas);
    for (const filling of [color(shade), this.patterns[codec]]) {
      context.fillStyle = filling;
      context.fillRect(0, 0, width, height);
    }
  }

  _drawTitle(context, group, inner) {
    context.save();
    context.beginPath();
    context.rect(inner.x, inner.y - TITLE_HEIGHT, inner.w, TITLE_HEIGHT);
    context.clip();
    context.fillStyle = color('soft');
    context.font = '11px system-ui, sans-serif';
    // The end of a long name says more than its beginning.
    const words = group.split('.');
    while (words.length > 1 && context.measureText(words.join('.')).width > inner.w) words.shift();
    context.fillText(words.join('.'), inner.x + 1, inner.y - 4);
    context.restore();
  }

  _tell(index) {
    const told = tellRow(this.chapter, this.cells[index].row);
    return told;
  }

  _pointer(event) {
    const inside = (cell) => event.offsetX >= cell.x && event.offsetX < cell.x + cell.w
      && event.offsetY >= cell.y && event.offsetY < cell.y + cell.h;
    const index = this.cells.findIndex(inside);
    if (index < 0) hideTip(); else showTip(this._tell(index), event.clientX, event.clientY);
  }

  _key(event) {
    const by = {
      ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10, Home: -Infinity, End: Infinity,
    }[event.key];
    if (by === undefined || !this.cells.length) return;
    event.preventDefault();
    const from = this.chosen ?? (by > 0 ? -1 : 1);
    this.chosen = Math.min(this.cells.length - 1, Math.max(0, from + by));
    this.draw();
    const box = this.canvas.getBoundingClientRect();
    const cell = this.cells[this.chosen];
    showTip(this._tell(this.chosen), box.left + cell.x + cell.w / 2, box.top + cell.y + cell.h / 2,
      { aloud: true });
  }
}

// All that is known of a row, for the box that follows the pointer.
function tellRow(chapter, row) {
  const { arrays } = chapter;
  const many = arrays.count[row];
  return {
    title: textOf(arrays.name[row]),
    rows: [
      ...(many > 1 ? [['arrays', count(many)]] : []),
      ['bytes', `${bytes(arrays.nbytes[row])} (${size(arrays.nbytes[row])})`],
      ['kind', textOf(arrays.kind[row])],
      ['part', `${textOf(arrays.role[row])}, ${textOf(arrays.tier[row])}`],
      ['codec', textOf(arrays.codec[row])],
      ['read', arrays.read_count[row] === 1 ? 'once' : `${count(arrays.read_count[row])} times`],
      ['first use', useText(arrays.first_use[row])],
    ],
    note: whyText(chapter, row, textOf(arrays.name[row])),
  };
}
