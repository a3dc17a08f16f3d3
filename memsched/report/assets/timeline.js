// A plan over time: plots that share one stretch of it, which pointer and keyboard move and zoom.

const LEAST_SHARE = 1e-5; // of the whole time: no closer

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
    this._add(new AxisPlot(this));
    for (const tier of chapter.tiers) this._addTier(tier);
    for (const lane of chapter.lanes) {
      if (lane.actions) {
        this.views.forEach((view, place) => this._add(new LanePlot(this, lane, view, place)));
      }
    }
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

  _addTier(tier) {
    const plot = new TierPlot(this, tier);
    if (tier.peak_bytes > 0) this._add(plot);
    else this.box.append(element('div', { class: 'row' }, plot.label,
      element('div', { class: 'soft small' }, 'Nothing of it counts against a budget.')));
  }

  _add(plot) {
    this.plots.push(plot);
    this.box.append(element('div', { class: `row ${plot.kind}-row` }, plot.label, plot.canvas));
    if (plot.words !== null) this._listen(plot);
  }

  _listen(plot) {
    const { canvas, words } = plot;
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
    const told = plot.tell(time);
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
    const told = plot.tell(time, to);
    if (told) showTip(told, box.left + this.x(time, box.width), box.bottom - 12, { aloud: true });
  }
}
