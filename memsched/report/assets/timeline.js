// A plan over time: what tiers hold, and what lanes are busy with. All plots share one stretch of
// time, which the pointer and the keyboard move and zoom.

const LEAST_SHARE = 1e-5; // of the whole time: no closer
const FAR = 4; // a budget that is so many times the peak is not drawn to scale

const laneColor = (name) => {
  if (name === 'compute') return color('compute');
  const [source, target] = name.split('->');
  if (target === 'nvme' || source === 'device') return color('write');
  return color(source === 'nvme' ? 'nvme' : 'host');
};

class Timeline {
  constructor(chapter) {
    this.chapter = chapter;
    this.views = Object.keys(chapter.lanes[0].views);
    this.view = this.views[0];
    this.plots = [];
    [this.start, this.end] = chapter.range_s;
    this.root = element('section', { class: 'part', 'aria-label': 'Over time' });
    this.box = element('div', { class: 'plots' });
    this.cursor = element('div', { class: 'cursor', hidden: '' });
    this.brush = element('div', { class: 'brush', hidden: '' });
    this.shown = element('span', { class: 'soft small', role: 'status' });
    this.root.append(this._head(), this._tools(), this._legend(), this.box);
    this._addAxis();
    for (const tier of chapter.tiers) this._addTier(tier);
    for (const lane of chapter.lanes) if (lane.actions) this._addLane(lane);
    this.box.append(this.cursor, this.brush);
  }

  _head() {
    const repeated = this.chapter.repeated
      ? ' A pass lasts from 0 to its end; what lies outside, and pale at its beginning, is fetched for the one after it.' : '';
    return element('div', {}, element('h2', {}, 'Over time'),
      element('p', { class: 'soft small' },
        'What each tier holds, and what the processor and each link do meanwhile.' + repeated
        + ' Drag to zoom in, double-click to see all. On a plot, keys: ← → next action, + − zoom, '
        + 'Shift ← → move, 0 all.'));
  }

  _tools() {
    const button = (label, words, act) =>
      element('button', { type: 'button', 'aria-label': words, title: words, click: act }, label);
    const tools = element('div', { class: 'tools', role: 'toolbar', 'aria-label': 'Time' },
      button('+', 'Zoom in', () => this.zoom(0.5)),
      button('−', 'Zoom out', () => this.zoom(2)),
      button('←', 'Earlier', () => this.move(-0.3)),
      button('→', 'Later', () => this.move(0.3)),
      button('All', 'Show all of the time', () => this.all()));
    if (this.views.length > 1) {
      tools.append(element('span', { class: 'gap' }),
        ...this.views.map((view) => element('button', {
          type: 'button', 'aria-pressed': String(view === this.view), 'data-view': view,
          click: () => this.choose(view),
        }, `memory as ${view}`)));
    }
    tools.append(this.shown);
    return tools;
  }

  _legend() {
    const used = data.parts.map((_, place) => this.chapter.tiers.some((tier) =>
      this.views.some((view) => [tier.views[view].parts[place]].flat().some((n) => n > 0))));
    return element('ul', { class: 'legend', 'aria-label': 'What memory is used for' },
      ...data.parts.flatMap((part, place) => used[place]
        ? [element('li', {}, swatch(`var(--${PART_COLORS[place]})`), part)] : []),
      element('li', {}, swatch('var(--budget)'), 'budget (line)'));
  }

  _row(label, kind, plot) {
    const canvas = element('canvas', { class: `plot ${kind}` });
    if (kind === 'axis') canvas.setAttribute('aria-hidden', 'true');
    plot.canvas = canvas;
    this.plots.push(plot);
    this.box.append(element('div', { class: `row ${kind}-row` }, label, canvas));
    return canvas;
  }

  _listen(plot, words) {
    const { canvas } = plot;
    for (const [name, value] of Object.entries({
      tabindex: '0', role: 'application', 'aria-roledescription': 'timeline', 'aria-label': words,
    })) canvas.setAttribute(name, value);
    canvas.addEventListener('pointermove', (event) => this._pointer(plot, event));
    canvas.addEventListener('pointerleave', () => { hideTip(); this._point(null); });
    canvas.addEventListener('pointerdown', (event) => this._down(plot, event));
    canvas.addEventListener('pointerup', (event) => this._up(plot, event));
    canvas.addEventListener('pointercancel', () => this._cancel());
    canvas.addEventListener('dblclick', () => this.all());
    canvas.addEventListener('wheel', (event) => {
      // The wheel alone scrolls the page.
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      this.zoom(event.deltaY > 0 ? 1.25 : 0.8, this._timeAt(plot, event));
    }, { passive: false });
    canvas.addEventListener('keydown', (event) => this._key(plot, event));
    canvas.addEventListener('blur', () => {
      plot.chosen = null; hideTip(); this._point(null); plot.draw();
    });
  }

  // ---- the stretch of time ----

  x(time, width) { return (time - this.start) / (this.end - this.start) * width; }

  _timeAt(plot, event) {
    const box = plot.canvas.getBoundingClientRect();
    return this.start + (event.clientX - box.left) / box.width * (this.end - this.start);
  }

  show(start, end) {
    const [first, last] = this.chapter.range_s;
    const whole = last - first;
    const length = Math.min(whole, Math.max(end - start, whole * LEAST_SHARE));
    this.start = Math.min(Math.max(start, first), last - length);
    this.end = this.start + length;
    this._point(null);
    this.draw();
  }

  zoom(factor, around = (this.start + this.end) / 2) {
    this.show(around - (around - this.start) * factor, around + (this.end - around) * factor);
  }

  move(share) {
    const by = share * (this.end - this.start);
    this.show(this.start + by, this.end + by);
  }

  all() { this.show(...this.chapter.range_s); }

  choose(view) {
    this.view = view;
    for (const button of this.root.querySelectorAll('[data-view]')) {
      button.setAttribute('aria-pressed', String(button.dataset.view === view));
    }
    this.draw();
  }

  draw() {
    const [first, last] = this.chapter.range_s;
    this.shown.textContent = this.end - this.start >= last - first ? `all ${seconds(last - first)}`
      : `${seconds(this.start)} to ${seconds(this.end)}`;
    for (const plot of this.plots) plot.draw();
  }

  _point(time, plot = this.plots[0]) {
    this.cursor.hidden = time === null;
    if (time === null) return;
    const box = plot.canvas.getBoundingClientRect();
    const left = box.left - this.box.getBoundingClientRect().left + this.x(time, box.width);
    this.cursor.style.transform = `translateX(${left}px)`;
  }

  // ---- pointer and keys ----

  _pointer(plot, event) {
    if (this.dragged) {
      const box = this.box.getBoundingClientRect();
      const [left, right] = [this.dragged.x, event.clientX].sort((a, b) => a - b);
      this.brush.hidden = right - left < 4;
      this.brush.style.transform = `translateX(${left - box.left}px)`;
      this.brush.style.width = `${right - left}px`;
      hideTip();
      return;
    }
    const time = this._timeAt(plot, event);
    this._point(time, plot);
    const told = plot.tell(time, event.offsetX);
    if (told) showTip(told, event.clientX, event.clientY); else hideTip();
  }

  _down(plot, event) {
    if (event.pointerType === 'touch' || event.button !== 0) return;
    this.dragged = { x: event.clientX, time: this._timeAt(plot, event) };
    plot.canvas.setPointerCapture(event.pointerId);
  }

  _up(plot, event) {
    if (event.pointerType === 'touch') this._pointer(plot, event);
    if (!this.dragged) return;
    const from = this.dragged;
    this._cancel();
    if (Math.abs(event.clientX - from.x) > 4) {
      const times = [from.time, this._timeAt(plot, event)].sort((a, b) => a - b);
      this.show(...times);
    }
  }

  _cancel() { this.dragged = null; this.brush.hidden = true; }

  _key(plot, event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const act = {
      '+': () => this.zoom(0.5), '=': () => this.zoom(0.5), '-': () => this.zoom(2),
      0: () => this.all(), Home: () => this._step(plot, -Infinity),
      End: () => this._step(plot, Infinity),
      ArrowLeft: () => (event.shiftKey ? this.move(-0.3) : this._step(plot, -1)),
      ArrowRight: () => (event.shiftKey ? this.move(0.3) : this._step(plot, 1)),
    }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  // To the next thing of a plot: it is brought into sight, marked and told.
  _step(plot, by) {
    const times = plot.times();
    if (!times.length) return;
    const inside = times.findIndex((time) => time >= this.start);
    const from = plot.chosen ?? (by > 0 ? Math.max(0, inside) - 1 : Math.max(1, inside));
    const to = Math.min(times.length - 1, Math.max(0, from + by));
    plot.chosen = to;
    const time = times[to];
    if (time < this.start || time > this.end) {
      const half = (this.end - this.start) / 2;
      this.show(time - half, time + half);
    }
    plot.draw();
    this._point(time, plot);
    const box = plot.canvas.getBoundingClientRect();
    const told = plot.tell(time, this.x(time, box.width), to);
    if (told) showTip(told, box.left + this.x(time, box.width), box.bottom - 12, { aloud: true });
  }

  // ---- plots ----

  _addAxis() {
    const plot = {
      chosen: null, times: () => [], tell: () => null,
      draw: () => {
        const { context, width } = prepare(plot.canvas);
        context.fillStyle = color('soft');
        context.strokeStyle = color('line');
        const step = niceStep((this.end - this.start) / Math.max(2, width / 90));
        for (let n = Math.ceil(this.start / step); n * step <= this.end; n += 1) {
          const at = this.x(n * step, width);
          context.beginPath(); context.moveTo(at, 16); context.lineTo(at, 22); context.stroke();
          const words = n === 0 ? '0' : tick(n * step, step);
          const half = context.measureText(words).width / 2;
          context.fillText(words, Math.min(Math.max(0, at - half), width - 2 * half), 12);
        }
      },
    };
    this._row(element('div', { class: 'label soft' }, 'time'), 'axis', plot);
  }

  // Lines at the beginning and the end of a pass as predicted, and a veil over what is outside.
  _passes(context, width, height, view) {
    if (!this._overlaps(view)) return;
    const [begin, end] = [this.x(0, width), this.x(this.chapter.seconds, width)];
    context.fillStyle = color('paper');
    context.globalAlpha = 0.45;
    if (begin > 0) context.fillRect(0, 0, begin, height);
    if (end < width) context.fillRect(end, 0, width - end, height);
    context.globalAlpha = 1;
    context.fillStyle = color('soft');
    for (const at of [begin, end]) if (at > 1 && at < width - 1) context.fillRect(at, 0, 1, height);
  }

  _addTier(tier) {
    const room = tier.capacity_bytes === null ? 'no limit' : `of ${size(tier.capacity_bytes)}`;
    const label = element('div', { class: 'label' }, element('b', {}, tier.name),
      element('span', { class: 'soft' }, 'peak ',
        figure(tier.peak_bytes, size(tier.peak_bytes)), ` ${room}`));
    if (tier.peak_bytes === 0) {
      this.box.append(element('div', { class: 'row' }, label,
        element('div', { class: 'soft small' }, 'Nothing of it counts against a budget.')));
      return;
    }
    const plot = { chosen: null };
    const stretches = () => tier.views[this.view];
    const at = (place, index) => {
      const column = stretches().parts[place];
      return typeof column === 'number' ? column : column[index];
    };
    const [first, last] = this.chapter.range_s;
    const begins = (index) => first + stretches().starts[index] / tier.columns * (last - first);
    plot.times = () => stretches().starts.map((_, index) => begins(index));
    plot.tell = (time, _x, index = lastBefore(stretches().starts.length, begins, time)) => {
      const held = data.parts.map((part, place) => [part, at(place, index), place])
        .filter(([, nbytes]) => nbytes > 0).reverse();
      const total = held.reduce((sum, [, nbytes]) => sum + nbytes, 0);
      return {
        title: `${tier.name}, ${this.view}, at ${seconds(time)}`,
        rows: [...held.map(([part, nbytes, place]) =>
          [part, size(nbytes), `var(--${PART_COLORS[place]})`]), ['together', size(total)],
        ['budget', tier.capacity_bytes === null ? 'none' : size(tier.capacity_bytes)]],
      };
    };
    plot.draw = () => this._drawTier(plot, tier, at, begins);
    const words = `${tier.name}: peak ${size(tier.peak_bytes)} ${room}`;
    this._row(label, 'tier', plot);
    this._listen(plot, words);
  }

  _drawTier(plot, tier, at, begins) {
    const { context, width, height } = prepare(plot.canvas);
    const limit = tier.capacity_bytes;
    const scaled = limit !== null && limit < FAR * tier.peak_bytes;
    const most = scaled ? Math.max(limit, tier.peak_bytes) * 1.1 : tier.peak_bytes * 1.25;
    const starts = tier.views[this.view].starts;
    const from = lastBefore(starts.length, begins, this.start);
    const shades = PART_COLORS.map(color);
    for (let index = from; index < starts.length && begins(index) <= this.end; index += 1) {
      const left = Math.round(this.x(begins(index), width));
      const next = index + 1 < starts.length ? begins(index + 1) : this.end;
      const right = Math.max(left + 1, Math.round(this.x(Math.min(next, this.end), width)));
      let level = 0;
      for (let place = 0; place < shades.length; place += 1) {
        const nbytes = at(place, index);
        if (!nbytes) continue;
        const top = height - (level + nbytes) / most * height;
        context.fillStyle = shades[place];
        context.fillRect(left, top, right - left, nbytes / most * height + 0.5);
        level += nbytes;
      }
    }
    this._passes(context, width, height, this.view);
    if (limit !== null) this._drawBudget(context, width, scaled ? height - limit / most * height
      : null, limit);
    if (plot.chosen !== null) {
      const left = this.x(begins(plot.chosen), width);
      context.fillStyle = color('focus');
      context.fillRect(left, 0, 2, height);
    }
  }

  _drawBudget(context, width, top, limit) {
    const words = top === null ? `budget ${size(limit)}, far above` : `budget ${size(limit)}`;
    context.fillStyle = color('budget');
    if (top !== null) context.fillRect(0, top, width, 1.5);
    const box = context.measureText(words).width;
    context.globalAlpha = 0.85;
    context.fillStyle = color('card');
    context.fillRect(width - box - 12, (top ?? 0) + 3, box + 8, 16);
    context.globalAlpha = 1;
    context.fillStyle = color('budget');
    context.fillText(words, width - box - 8, (top ?? 0) + 15);
  }

  _addLane(lane) {
    const share = this.chapter.seconds ? lane.busy_s / this.chapter.seconds : 0;
    this.views.forEach((view, place) => {
      const name = element('div', { class: 'label' });
      if (place === 0) {
        name.append(element('b', {}, arrow(lane.name)), element('span', { class: 'soft' },
          `busy ${percent(share)}${lane.nbytes ? `, ${size(lane.nbytes)}` : ''}`));
      } else name.append(element('span', { class: 'soft' }, view));
      const plot = { chosen: null };
      const blocks = lane.views[view];
      plot.times = () => blocks.start_s;
      plot.tell = (time, _x, index = this._blockAt(plot, blocks, time)) => {
        if (index !== null) return this._tellBlock(lane, view, index);
        const early = this._overlaps(view)
          ? this._blockAt(plot, blocks, time + this.chapter.seconds) : null;
        return early === null ? null : this._tellBlock(lane, view, early);
      };
      plot.draw = () => this._drawLane(plot, lane, blocks, view);
      this._row(name, 'lane', plot);
      this._listen(plot, `${arrow(lane.name)}, ${view}: ${plural(lane.actions, 'action')}, `
        + `busy for ${percent(share)} of the time`);
    });
  }

  // Whether the end of a pass lies beside the beginning of the next one, which is like it.
  _overlaps(view) { return this.chapter.repeated && view === 'predicted'; }

  // The block under the pointer; one that is thinner than two pixels is met from nearby.
  _blockAt(plot, blocks, time) {
    const near = 2 * (this.end - this.start) / plot.canvas.getBoundingClientRect().width;
    const index = lastBefore(blocks.start_s.length, (n) => blocks.start_s[n], time + near);
    return index >= 0 && time <= blocks.end_s[index] + near && time + near >= blocks.start_s[index]
      ? index : null;
  }

  _drawLane(plot, lane, blocks, view) {
    const { context, width, height } = prepare(plot.canvas);
    const shade = laneColor(lane.name);
    const [top, tall] = view === 'predicted' ? [3, height - 6] : [6, height - 12];
    if (this._overlaps(view)) {
      // What the pass before this one fetched at its end is still under way: the same blocks.
      context.fillStyle = shade;
      context.globalAlpha = 0.5;
      for (let n = blocks.start_s.length - 1; n >= 0; n -= 1) {
        const end = blocks.end_s[n] - this.chapter.seconds;
        if (end <= 0) break;
        const left = this.x(Math.max(blocks.start_s[n] - this.chapter.seconds,
          this.chapter.range_s[0]), width);
        context.fillRect(left, top, Math.max(1, this.x(end, width) - left), tall);
      }
      context.globalAlpha = 1;
    }
    const seen = this._seen(blocks, width);
    context.fillStyle = shade;
    for (const { n, left, wide } of seen) {
      const length = blocks.end_s[n] - blocks.start_s[n];
      // Blocks of many actions are as dense as their lane is busy.
      context.globalAlpha = blocks.count[n] > 1 && length
        ? 0.35 + 0.65 * Math.min(1, blocks.busy_s[n] / length) : 1;
      context.fillRect(left, top, wide > 3 ? wide - 0.6 : wide, tall);
    }
    context.globalAlpha = 1;
    this._passes(context, width, height, view);
    // Over the veil, which would make words pale.
    for (const { n, left, wide } of seen) {
      if (wide > 70) this._drawName(context, this._shortName(blocks, n), left, wide, height);
      if (n === plot.chosen) {
        context.strokeStyle = color('focus');
        context.lineWidth = 2;
        context.strokeRect(left, top - 1, Math.max(2, wide), tall + 2);
      }
    }
  }

  // Blocks in the shown stretch of time, and where they are.
  _seen(blocks, width) {
    const seen = [];
    for (let n = 0; n < blocks.start_s.length; n += 1) {
      if (blocks.end_s[n] < this.start || blocks.start_s[n] > this.end) continue;
      const left = this.x(blocks.start_s[n], width);
      seen.push({ n, left, wide: Math.max(1, this.x(blocks.end_s[n], width) - left) });
    }
    return seen;
  }

  _drawName(context, name, left, wide, height) {
    context.save();
    context.beginPath();
    context.rect(left, 0, wide - 4, height);
    context.clip();
    context.fillStyle = color('label');
    context.fillText(name, Math.max(left, 0) + 5, height / 2 + 4);
    context.restore();
  }

  _shortName(blocks, n) {
    return blocks.count[n] > 1 ? `${count(blocks.count[n])} actions` : textOf(blocks.name[n]);
  }

  _tellBlock(lane, view, n) {
    const blocks = lane.views[view];
    const [start, end, many] = [blocks.start_s[n], blocks.end_s[n], blocks.count[n]];
    const isRun = lane.name === 'compute';
    const name = textOf(blocks.name[n]);
    const rows = [
      ['lane', arrow(lane.name)], ['from', seconds(start)], ['for', seconds(end - start)]];
    if (!isRun) rows.push(['bytes', `${bytes(blocks.nbytes[n])} (${size(blocks.nbytes[n])})`]);
    if (many > 1) {
      const busy = end > start ? percent(blocks.busy_s[n] / (end - start)) : percent(1);
      rows.push(['of this busy', busy], ['the last', textOf(blocks.last[n])]);
      return { title: `The first of ${count(many)} actions: ${name}`, rows, note: 'Too short to be '
        + 'shown one by one; the Perfetto file has all of them.' };
    }
    if (isRun) return { title: name, rows, note: `Step, ${view}.` };
    rows.push(['next use', useText(blocks.next[n])]);
    return { title: name, rows, note: whyText(this.chapter, blocks.row[n], name) };
  }
}

// The last of so many that begins at a time or before; 0 if all begin later.
function lastBefore(many, begins, time) {
  let [low, high] = [0, many - 1];
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (begins(middle) <= time) low = middle; else high = middle - 1;
  }
  return low;
}

function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map((times) => times * power).find((step) => step >= least);
}

// A time with as many digits as its neighbours need.
function tick(time, step) {
  const [scale, unit] = [[1, 's'], [1e-3, 'ms'], [1e-6, 'µs'], [1e-9, 'ns']]
    .find(([unitScale]) => Math.abs(time) >= unitScale) ?? [1e-9, 'ns'];
  const decimals = Math.min(9, Math.max(0, -Math.floor(Math.log10(step / scale) + 1e-9)));
  return `${(time / scale).toFixed(decimals)} ${unit}`;
}
