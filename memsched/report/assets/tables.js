// Tables that sort, by click and by key; one row of each can be reached with Tab, the others with
// the arrow keys.

const SHOWN = 25;

// A column: label, value (to sort by), shown (a text or an element), and a class.
function sortable({ caption, columns, rows, sort = null, more = rows.length, tell = null, mark }) {
  const state = { by: sort?.by ?? null, down: sort?.down ?? false, shown: more, rows };
  const heads = columns.map((column, place) => element('th', {
    scope: 'col', class: column.class ?? '',
  }, element('button', { type: 'button', click: () => order(place) }, column.label)));
  const body = element('tbody');
  const table = element('table', {}, element('caption', {}, caption),
    element('thead', {}, element('tr', {}, ...heads)), body);
  const extend = element('button', { type: 'button', class: 'more', click: () => {
    state.shown += 10 * SHOWN;
    fill();
  } });
  const root = element('div', {}, element('div', { class: 'scroll' }, table), extend);

  function order(place) {
    state.down = state.by === place ? !state.down : Boolean(columns[place].down);
    state.by = place;
    fill();
  }

  function sorted() {
    if (state.by === null) return state.rows;
    const { value } = columns[state.by];
    const sign = state.down ? -1 : 1;
    const compare = (a, b) => (typeof a === 'string' ? a.localeCompare(b, 'en', { numeric: true })
      : a - b);
    // What has no value comes last either way.
    return [...state.rows].sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * compare(a, b);
    });
  }

  function fill() {
    heads.forEach((head, place) => head.setAttribute('aria-sort',
      place !== state.by ? 'none' : state.down ? 'descending' : 'ascending'));
    const all = sorted();
    body.replaceChildren(...all.slice(0, state.shown).map((row, place) => {
      const made = element('tr', { class: mark?.(row) ? 'chosen' : null },
        ...columns.map((column) => element('td', {
          class: column.class ?? null, 'data-value': column.value(row) ?? '',
        }, column.shown(row))));
      if (tell) follow(made, row, place);
      return made;
    }));
    extend.hidden = all.length <= state.shown;
    extend.textContent = `Show more: ${count(all.length - state.shown)} are left`;
  }

  function follow(made, row, place) {
    made.tabIndex = place === 0 ? 0 : -1;
    made.addEventListener('focus', () => {
      const box = made.getBoundingClientRect();
      if (made.matches(':focus-visible')) {
        showTip(tell(row), box.left + box.width / 2, box.bottom - 12, { aloud: true });
      }
    });
    made.addEventListener('blur', hideTip);
    made.addEventListener('pointermove', (event) => showTip(tell(row), event.clientX, event.clientY));
    made.addEventListener('pointerleave', hideTip);
    made.addEventListener('keydown', (event) => {
      const next = { ArrowDown: made.nextElementSibling, ArrowUp: made.previousElementSibling,
        Home: body.firstElementChild, End: body.lastElementChild }[event.key];
      if (!next) return;
      event.preventDefault();
      made.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  }

  fill();
  return { root, keep(chosen) { state.rows = chosen; fill(); } };
}

const sizeCell = (nbytes) => element('span', {}, size(nbytes),
  nbytes >= 1024 ? element('span', { class: 'exact' }, bytes(nbytes)) : null);

function arraysTable(chapter, map) {
  const { arrays } = chapter;
  const rows = arrays.name.map((_, row) => row);
  const word = (column) => (row) => textOf(arrays[column][row]);
  const worded = (label, column, extra = '') => ({
    label, class: extra, value: word(column), shown: word(column) });
  const table = sortable({
    caption: 'Hover, or go through it with the arrow keys, to see all of a row.',
    rows, more: SHOWN, sort: { by: 1, down: true }, tell: (row) => tellRow(chapter, row),
    columns: [
      { label: 'Array', class: 'name', value: word('name'),
        shown: (row) => element('span', {}, named(word('name')(row)),
          arrays.count[row] > 1 ? ` (${count(arrays.count[row])})` : null) },
      { label: 'Bytes', class: 'number', down: true, value: (row) => arrays.nbytes[row],
        shown: (row) => sizeCell(arrays.nbytes[row]) },
      worded('Part', 'role'),
      worded('Tier', 'tier'),
      worded('Kind', 'kind', 'wide'),
      worded('Codec', 'codec', 'wide'),
      { label: 'Reads', class: 'number wide', down: true, value: (row) => arrays.read_count[row],
        shown: (row) => count(arrays.read_count[row]) },
      { label: 'First use', class: 'wide', value: (row) => arrays.first_use[row]?.[1] ?? null,
        shown: (row) => (arrays.first_use[row] ? seconds(arrays.first_use[row][1]) : '–') },
      worded('Why it is there', 'why', 'why wide'),
    ],
  });
  const status = element('span', { class: 'soft small', role: 'status' });
  const total = () => rows.reduce((sum, row) => sum + arrays.count[row], 0);
  const filter = element('input', {
    class: 'filter', type: 'search', placeholder: 'part of a name, a tier, a kind …',
    'aria-label': 'Show only arrays with these words', input: () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      const found = (row) => {
        const line = ['name', 'role', 'tier', 'kind', 'codec'].map((c) => word(c)(row)).join(' ')
          .toLowerCase();
        return words.every((one) => line.includes(one));
      };
      const kept = rows.filter(found);
      table.keep(kept);
      status.textContent = words.length ? `${count(kept.length)} of ${count(rows.length)} rows` : '';
      map.found = words.length ? found : () => true;
      map.draw();
    },
  });
  return element('section', { class: 'part', 'aria-label': 'All arrays' },
    element('h2', {}, `All arrays: ${count(total())}`),
    element('div', { class: 'tools' }, filter, status), table.root);
}

// A bar as long as a share of the longest.
const within = (share, shade) => {
  const made = element('i');
  made.style.width = `${Math.min(100, 100 * share)}%`;
  made.style.background = shade;
  return element('span', { class: 'bar within', 'aria-hidden': 'true' }, made);
};

function lanesTable(chapter) {
  const table = sortable({
    caption: 'Predicted, of one pass.',
    rows: chapter.lanes,
    columns: [
      { label: 'Lane', value: (lane) => lane.name, shown: (lane) => arrow(lane.name) },
      { label: 'Actions', class: 'number wide', down: true, value: (lane) => lane.actions,
        shown: (lane) => count(lane.actions) },
      { label: 'Bytes', class: 'number', down: true, value: (lane) => lane.nbytes,
        shown: (lane) => (lane.name === 'compute' ? '–' : sizeCell(lane.nbytes)) },
      { label: 'Busy', class: 'number', down: true, value: (lane) => lane.busy_s,
        shown: (lane) => seconds(lane.busy_s) },
      { label: 'Of the time', class: 'number', down: true,
        value: (lane) => (chapter.seconds ? lane.busy_s / chapter.seconds : 0),
        shown: (lane) => (chapter.seconds ? percent(lane.busy_s / chapter.seconds) : '–') },
    ],
  });
  return element('section', { class: 'part', 'aria-label': 'Lanes' },
    element('h2', {}, 'Processor and links'), table.root);
}

function baselinesTable(chapter) {
  if (!chapter.baselines.length) return null;
  const rows = [['this plan', chapter.seconds], ...chapter.baselines];
  const longest = Math.max(...rows.map(([, took]) => took ?? 0));
  const table = sortable({
    caption: 'Predicted seconds of a pass, if plainer ways moved the memory.',
    rows, sort: { by: 1 }, mark: ([name]) => name === 'this plan',
    columns: [
      { label: 'Way', value: ([name]) => name, shown: ([name]) => name },
      { label: 'Seconds', class: 'number', value: ([, took]) => took,
        shown: ([, took]) => (took === null ? 'does not fit' : seconds(took)) },
      { label: 'Times this', class: 'number',
        value: ([, took]) => (took === null ? null : took / chapter.seconds),
        shown: ([, took]) => (took === null ? '–' : digits(took / chapter.seconds)) },
      { label: '', class: 'wide', value: ([, took]) => took,
        shown: ([name, took]) => within((took ?? 0) / longest,
          name === 'this plan' ? 'var(--accent)' : 'var(--idle)') },
    ],
  });
  return element('section', { class: 'part', 'aria-label': 'Other ways' },
    element('h2', {}, 'Other ways'), table.root);
}

// What more of something is worth: seconds of the bound, and tokens/s where a pass makes some.
function pricesTable(chapter) {
  const priced = Object.keys(chapter.gains_s).length ? chapter.gains_s : chapter.prices_s_per_gb;
  const rows = Object.entries(priced);
  if (!rows.length) return null;
  const tiers = new Set(chapter.tiers.map((tier) => tier.name));
  const rate = (gain) => (chapter.bound_s > gain
    ? chapter.tokens / (chapter.bound_s - gain) - chapter.tokens / chapter.bound_s : null);
  const table = sortable({
    caption: 'By how much the bound moves with more of one thing.',
    rows, sort: { by: 1, down: true },
    columns: [
      { label: 'More', value: ([name]) => name, shown: ([name]) =>
        (tiers.has(name) ? `1 GB more of ${name}` : `${name} twice as fast`) },
      { label: 'Saves', class: 'number', down: true, value: ([, gain]) => gain,
        shown: ([, gain]) => seconds(gain) },
      ...(chapter.tokens ? [{ label: 'Tokens/s', class: 'number', down: true,
        value: ([, gain]) => rate(gain),
        shown: ([, gain]) => (rate(gain) === null ? '–' : `+${digits(rate(gain))}`) }] : []),
    ],
  });
  return element('section', { class: 'part', 'aria-label': 'Prices' },
    element('h2', {}, 'What more would be worth'), table.root);
}

function comparisonTable(chapter) {
  if (!chapter.lines.length) return null;
  const shown = (value, unit) => (unit === 'B' ? sizeCell(value) : seconds(value));
  const table = sortable({
    caption: 'One pass, as predicted and as it was.',
    rows: chapter.lines,
    columns: [
      { label: 'What', value: ([what]) => what, shown: ([what]) => arrow(what) },
      { label: 'Predicted', class: 'number', value: ([, , value]) => value,
        shown: ([, unit, value]) => shown(value, unit) },
      { label: 'Measured', class: 'number', value: ([, , , value]) => value,
        shown: ([, unit, , value]) => shown(value, unit) },
      { label: 'Ratio', class: 'number', down: true,
        value: ([, , predicted, measured]) => (predicted ? measured / predicted : null),
        shown: ([, , predicted, measured]) => (predicted ? (measured / predicted).toFixed(3) : '–') },
    ],
  });
  return element('section', { class: 'part', 'aria-label': 'Predicted and measured' },
    element('h2', {}, 'Predicted and measured'), table.root);
}

// What XLA assigns to steps that it has compiled, beside what was estimated from their equations.
function workspacesTable(chapter) {
  if (!chapter.workspaces.length) return null;
  const figures = (label, place) => ({ label, class: 'number', down: true,
    value: (row) => row[place], shown: (row) => sizeCell(row[place]) });
  const table = sortable({
    caption: 'Of every kind of step: our estimate, and what XLA assigns, which this plan counts.',
    rows: chapter.workspaces, more: SHOWN, sort: { by: 2, down: true },
    columns: [
      { label: 'Step', class: 'name', value: ([step]) => step, shown: ([step]) => named(step) },
      figures('Estimated', 1),
      figures('XLA', 2),
      { label: 'Ratio', class: 'number', down: true, value: ([, , , ratio]) => ratio,
        shown: ([, , , ratio]) => (ratio === null ? '–' : digits(ratio)) },
    ],
  });
  return element('section', { class: 'part', 'aria-label': 'Workspaces' },
    element('h2', {}, 'Workspace of steps'), table.root);
}
