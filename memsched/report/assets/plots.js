// The plots of a timeline: its axis, what a tier holds, what a lane is busy with. Each knows when its
// things begin (`times`), tells what is there at a time, and draws the stretch that is shown.
// `chosen` is the thing that the keyboard is at; a plot without `words` cannot be reached by it.

const FAR = 4; // a budget that is so many times the peak is not drawn to scale

const laneColor = (name) => {
  if (name === 'compute') return color('compute');
  const [source, target] = name.split('->');
  if (target === 'nvme' || source === 'device') return color('write');
  return color(source === 'nvme' ? 'nvme' : 'host');
};

class Plot {
  constructor(timeline, kind, label, words = null) {
    Object.assign(this, { timeline, kind, label, words, chosen: null });
    this.canvas = element('canvas', { class: `plot ${kind}` });
  }

  x(time, width) { return this.timeline.x(time, width); }

  // Lines at the beginning and the end of a pass as predicted, and a veil over what is outside.
  veil(context, width, height, view) {
    if (!this.overlaps(view)) return;
    const [begin, end] = [this.x(0, width), this.x(this.timeline.chapter.seconds, width)];
    context.fillStyle = color('paper');
    context.globalAlpha = 0.45;
    if (begin > 0) context.fillRect(0, 0, begin, height);
    if (end < width) context.fillRect(end, 0, width - end, height);
    context.globalAlpha = 1;
    context.fillStyle = color('soft');
    for (const at of [begin, end]) if (at > 1 && at < width - 1) context.fillRect(at, 0, 1, height);
  }

  // Whether the end of a pass lies beside the beginning of the next one, which is like it.
  overlaps(view) { return this.timeline.chapter.repeated && view === 'predicted'; }
}

class AxisPlot extends Plot {
  constructor(timeline) {
    super(timeline, 'axis', element('div', { class: 'label soft' }, 'time'));
    this.canvas.setAttribute('aria-hidden', 'true');
  }

  times() { return []; }

  tell() { return null; }

  draw() {
    const { context, width } = prepare(this.canvas);
    const { start, end } = this.timeline;
    context.fillStyle = color('soft');
    context.strokeStyle = color('line');
    const step = niceStep((end - start) / Math.max(2, width / 90));
    for (let n = Math.ceil(start / step); n * step <= end; n += 1) {
      const at = this.x(n * step, width);
      context.beginPath(); context.moveTo(at, 16); context.lineTo(at, 22); context.stroke();
      const words = n === 0 ? '0' : tick(n * step, step);
      const half = context.measureText(words).width / 2;
      context.fillText(words, Math.min(Math.max(0, at - half), width - 2 * half), 12);
    }
  }
}

class TierPlot extends Plot {
  constructor(timeline, tier) {
    const room = tier.capacity_bytes === null ? 'no limit' : `of ${size(tier.capacity_bytes)}`;
    const label = element('div', { class: 'label' }, element('b', {}, tier.name),
      element('span', { class: 'soft' }, 'peak ',
        figure(tier.peak_bytes, size(tier.peak_bytes)), ` ${room}`));
    super(timeline, 'tier', label, `${tier.name}: peak ${size(tier.peak_bytes)} ${room}`);
    this.tier = tier;
  }

  get stretches() { return this.tier.views[this.timeline.view]; }

  times() { return this.stretches.starts.map((_, index) => this._begins(index)); }

  tell(time, index = this._lastBefore(time)) {
    const { tier } = this;
    const held = data.parts.map((part, place) => [part, this._bytes(place, index), place])
      .filter(([, nbytes]) => nbytes > 0).reverse();
    const total = held.reduce((sum, [, nbytes]) => sum + nbytes, 0);
    return {
      title: `${tier.name}, ${this.timeline.view}, at ${seconds(time)}`,
      rows: [...held.map(([part, nbytes, place]) =>
        [part, size(nbytes), `var(--${PART_COLORS[place]})`]), ['together', size(total)],
      ['budget', tier.capacity_bytes === null ? 'none' : size(tier.capacity_bytes)]],
    };
  }

  draw() {
    const { context, width, height } = prepare(this.canvas);
    const { capacity_bytes: limit, peak_bytes: peak } = this.tier;
    const scaled = limit !== null && limit < FAR * peak;
    const most = scaled ? Math.max(limit, peak) * 1.1 : peak * 1.25;
    this._drawStretches(context, width, height, most);
    this.veil(context, width, height, this.timeline.view);
    if (limit !== null) this._drawBudget(context, width, scaled ? height - limit / most * height
      : null, limit);
    if (this.chosen !== null) {
      const left = this.x(this._begins(this.chosen), width);
      context.fillStyle = color('focus');
      context.fillRect(left, 0, 2, height);
    }
  }

  _begins(index) {
    const [first, last] = this.timeline.chapter.range_s;
    return first + this.stretches.starts[index] / this.tier.columns * (last - first);
  }

  _lastBefore(time) {
    return lastBefore(this.stretches.starts.length, (index) => this._begins(index), time);
  }

  _bytes(place, index) {
    const column = this.stretches.parts[place];
    return typeof column === 'number' ? column : column[index];
  }

  _drawStretches(context, width, height, most) {
    const { starts } = this.stretches;
    const { start, end } = this.timeline;
    const shades = PART_COLORS.map(color);
    const from = this._lastBefore(start);
    for (let index = from; index < starts.length && this._begins(index) <= end; index += 1) {
      const left = Math.round(this.x(this._begins(index), width));
      const next = index + 1 < starts.length ? this._begins(index + 1) : end;
      const right = Math.max(left + 1, Math.round(this.x(Math.min(next, end), width)));
      let level = 0;
      for (let place = 0; place < shades.length; place += 1) {
        const nbytes = this._bytes(place, index);
        if (!nbytes) continue;
        const top = height - (level + nbytes) / most * height;
        context.fillStyle = shades[place];
        context.fillRect(left, top, right - left, nbytes / most * height + 0.5);
        level += nbytes;
      }
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
}

class LanePlot extends Plot {
  constructor(timeline, lane, view, place) {
    const share = timeline.chapter.seconds ? lane.busy_s / timeline.chapter.seconds : 0;
    const label = element('div', { class: 'label' });
    if (place === 0) {
      label.append(element('b', {}, arrow(lane.name)), element('span', { class: 'soft' },
        `busy ${percent(share)}${lane.nbytes ? `, ${size(lane.nbytes)}` : ''}`));
    } else label.append(element('span', { class: 'soft' }, view));
    super(timeline, 'lane', label, `${arrow(lane.name)}, ${view}: `
      + `${plural(lane.actions, 'action')}, busy for ${percent(share)} of the time`);
    Object.assign(this, { lane, view, blocks: lane.views[view] });
  }

  times() { return this.blocks.start_s; }

  tell(time, index = this._blockAt(time)) {
    if (index !== null) return this._tellBlock(index);
    const early = this.overlaps(this.view)
      ? this._blockAt(time + this.timeline.chapter.seconds) : null;
    return early === null ? null : this._tellBlock(early);
  }

  // The block under the pointer; one that is thinner than two pixels is met from nearby.
  _blockAt(time) {
    const { blocks } = this;
    const { start, end } = this.timeline;
    const near = 2 * (end - start) / this.canvas.getBoundingClientRect().width;
    const index = lastBefore(blocks.start_s.length, (n) => blocks.start_s[n], time + near);
    return index >= 0 && time <= blocks.end_s[index] + near && time + near >= blocks.start_s[index]
      ? index : null;
  }

  draw() {
    const { context, width, height } = prepare(this.canvas);
    const { blocks, view } = this;
    const shade = laneColor(this.lane.name);
    const [top, tall] = view === 'predicted' ? [3, height - 6] : [6, height - 12];
    if (this.overlaps(view)) this._drawBefore(context, width, top, tall, shade);
    const seen = this._seen(width);
    context.fillStyle = shade;
    for (const { n, left, wide } of seen) {
      const length = blocks.end_s[n] - blocks.start_s[n];
      // Blocks of many actions are as dense as their lane is busy.
      context.globalAlpha = blocks.count[n] > 1 && length
        ? 0.35 + 0.65 * Math.min(1, blocks.busy_s[n] / length) : 1;
      context.fillRect(left, top, wide > 3 ? wide - 0.6 : wide, tall);
    }
    context.globalAlpha = 1;
    this.veil(context, width, height, view);
    // Over the veil, which would make words pale.
    for (const { n, left, wide } of seen) {
      if (wide > 70) this._drawName(context, this._shortName(n), left, wide, height);
      if (n === this.chosen) {
        context.strokeStyle = color('focus');
        context.lineWidth = 2;
        context.strokeRect(left, top - 1, Math.max(2, wide), tall + 2);
      }
    }
  }

  // What the pass before this one fetched at its end is still under way: the same blocks.
  _drawBefore(context, width, top, tall, shade) {
    const { blocks } = this;
    const { seconds: pass, range_s: [first] } = this.timeline.chapter;
    context.fillStyle = shade;
    context.globalAlpha = 0.5;
    for (let n = blocks.start_s.length - 1; n >= 0; n -= 1) {
      const end = blocks.end_s[n] - pass;
      if (end <= 0) break;
      const left = this.x(Math.max(blocks.start_s[n] - pass, first), width);
      context.fillRect(left, top, Math.max(1, this.x(end, width) - left), tall);
    }
    context.globalAlpha = 1;
  }

  // Blocks in the shown stretch of time, and where they are.
  _seen(width) {
    const { blocks, timeline: { start, end } } = this;
    const seen = [];
    for (let n = 0; n < blocks.start_s.length; n += 1) {
      if (blocks.end_s[n] < start || blocks.start_s[n] > end) continue;
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

  _shortName(n) {
    const { blocks } = this;
    return blocks.count[n] > 1 ? `${count(blocks.count[n])} actions` : textOf(blocks.name[n]);
  }

  _tellBlock(n) {
    const { blocks, lane, view } = this;
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
    return { title: name, rows, note: whyText(this.timeline.chapter, blocks.row[n], name) };
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
