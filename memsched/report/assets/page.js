// The page: what is said once, a tab for each plan, and what is shown of the chosen one.

let shown = null;

function card(title, big, unit, note, key) {
  return element('div', { class: 'card', id: `card-${key}` }, element('h2', {}, title),
    element('div', { class: 'big' }, big, ' ', element('span', { class: 'unit' }, unit)),
    element('div', { class: 'soft small' }, note));
}

function cover() {
  document.getElementById('cover').append(element('h1', {}, data.title),
    ...data.lines.map((line) => element('p', { class: 'soft' }, line)));
  const last = data.chapters.at(-1);
  const cards = [];
  const timed = (value) => {
    const [first, ...rest] = seconds(value).split(' ');
    return rest.length > 1 ? [figure(value, seconds(value)), ''] : [figure(value, first), rest[0]];
  };
  if (last.tokens && last.seconds) {
    const rate = last.tokens / last.seconds;
    cards.push(card('Speed', figure(rate, digits(rate)), 'tokens/s',
      `${last.name}: ${seconds(last.seconds)} for ${plural(last.tokens, 'token')}`, 'rate'));
  }
  if (data.first_token_s !== null) {
    cards.push(card('First token after', ...timed(data.first_token_s),
      'with all weights in files before', 'first'));
  }
  if (data.total_s !== null) {
    cards.push(card('The whole request', ...timed(data.total_s), 'to the last token', 'total'));
  }
  if (last.gap !== null) {
    cards.push(card('Above the bound', figure(last.gap, digits(100 * last.gap)), '%',
      `no schedule beats ${seconds(last.bound_s)} (${arrow(last.bound_by)})`
        + (last.contended ? ', contention aside' : ''), 'gap'));
  }
  document.getElementById('headline').append(...cards);
}

function tabs() {
  const list = document.getElementById('chapters');
  data.chapters.forEach((chapter, place) => {
    const often = chapter.count > 1 ? `${count(chapter.count)} × ` : '';
    list.append(element('button', {
      type: 'button', role: 'tab', id: `tab-${place}`, 'aria-controls': 'chapter',
      click: () => choose(place), keydown: (event) => step(event, place),
    }, element('b', {}, chapter.name), element('small', {}, often + seconds(chapter.seconds))));
  });
}

function step(event, place) {
  const many = data.chapters.length;
  const to = { ArrowRight: (place + 1) % many, ArrowLeft: (place + many - 1) % many, Home: 0,
    End: many - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  choose(to);
  document.getElementById(`tab-${to}`).focus();
}

function choose(place) {
  const chapter = data.chapters[place];
  data.chapters.forEach((_, other) => {
    const tab = document.getElementById(`tab-${other}`);
    tab.setAttribute('aria-selected', String(other === place));
    tab.tabIndex = other === place ? 0 : -1;
    // On narrow screens tabs scroll sideways; the page itself must not.
    if (other === place) tab.parentElement.scrollLeft = tab.offsetLeft - 40;
  });
  hideTip();
  const map = new ArrayMap(chapter);
  const timeline = new Timeline(chapter);
  const panel = document.getElementById('chapter');
  panel.setAttribute('aria-labelledby', `tab-${place}`);
  const tables = [comparisonTable(chapter), lanesTable(chapter), baselinesTable(chapter),
    pricesTable(chapter), workspacesTable(chapter)].filter(Boolean);
  panel.replaceChildren(inNumbers(chapter), timeline.root,
    element('div', { class: 'pair' }, ...tables), map.root, arraysTable(chapter, map));
  shown = () => { timeline.draw(); map.draw(); };
  shown();
}

function inNumbers(chapter) {
  const often = chapter.count > 1 ? `, ${count(chapter.count)} times` : '';
  const again = chapter.runs > chapter.steps
    ? `, ${plural(chapter.runs - chapter.steps, 'step')} run again` : '';
  const lines = [
    `${chapter.repeated ? 'A pass' : 'The plan'} takes ${seconds(chapter.seconds)}${often}.`
    + (chapter.gap === null ? '' : ` No schedule beats ${seconds(chapter.bound_s)} `
      + `(${arrow(chapter.bound_by)}): it is ${percent(chapter.gap)} above that.`),
    ...chapter.sentences.map(arrow),
    ...(chapter.moving_s ? [`Before it, weights move for ${seconds(chapter.moving_s)}.`] : []),
    `${plural(chapter.steps, 'step')}, ${plural(chapter.actions, 'action')}${again}.`,
  ];
  return element('div', { class: 'cards' },
    element('div', { class: 'card' }, element('h3', {}, 'In short'),
      element('ul', {}, ...lines.map((line) => element('li', {}, line)))),
    element('div', { class: 'card' }, element('h3', {}, 'Memory at its fullest'),
      ...chapter.tiers.map(memoryMeter)),
    element('div', { class: 'card' }, element('h3', {}, 'Busy of the time'),
      ...chapter.lanes.filter((lane) => lane.actions).map((lane) => laneMeter(chapter, lane))));
}

// Kinds of the peak in the colours of the plot; weights are not told apart there.
const PEAK_COLORS = { weight: 'pinned', cache: 'cache', feature: 'features', embedding: 'inputs',
  input: 'inputs', activation: 'activations', workspace: 'workspace', 'idle in the arena': 'idle' };

function memoryMeter(tier) {
  const whole = Math.max(tier.capacity_bytes ?? 0, tier.peak_bytes, 1);
  const parts = Object.entries(tier.peak_parts).sort(([, a], [, b]) => b - a);
  const bar = element('div', { class: 'bar', 'aria-hidden': 'true' }, ...parts.map(([part, nbytes]) => {
    const made = element('i');
    made.style.width = `${100 * nbytes / whole}%`;
    made.style.background = `var(--${PEAK_COLORS[part] ?? 'idle'})`;
    return made;
  }));
  const room = tier.capacity_bytes === null ? 'no limit' : size(tier.capacity_bytes);
  return element('div', { class: 'meter', 'data-tier': tier.name },
    element('div', {}, element('b', {}, tier.name), element('span', {},
      figure(tier.peak_bytes, size(tier.peak_bytes), { title: bytes(tier.peak_bytes) }),
      element('span', { class: 'soft' }, ` of ${room}`))), bar,
    element('div', { class: 'soft small' }, parts.length ? parts.map(([part, nbytes]) =>
      `${part} ${size(nbytes)}`).join(', ') : 'nothing that counts'));
}

function laneMeter(chapter, lane) {
  const share = chapter.seconds ? lane.busy_s / chapter.seconds : 0;
  const bar = element('i');
  bar.style.width = `${Math.min(100, 100 * share)}%`;
  bar.style.background = laneColor(lane.name);
  return element('div', { class: 'meter', 'data-lane': lane.name },
    element('div', {}, element('b', {}, arrow(lane.name)), element('span', {},
      figure(share, percent(share)), element('span', { class: 'soft' },
        lane.nbytes ? `, ${size(lane.nbytes)}` : ''))),
    element('div', { class: 'bar', 'aria-hidden': 'true' }, bar));
}

function closing() {
  const entries = Object.entries(data.assumptions);
  const least = Object.entries(data.smallest_bytes);
  document.getElementById('closing').append(
    ...(least.length ? [element('p', {}, 'The least that would do: '
      + least.map(([tier, nbytes]) => `${bytes(nbytes)} of ${tier}`).join(', ') + '.')] : []),
    ...(entries.length ? [element('h2', {}, 'What this rests on'), element('dl', {},
      ...entries.flatMap(([name, value]) => [element('dt', {}, name), element('dd', {}, value)]))]
      : []));
}

cover();
tabs();
closing();
choose(data.chapters.length - 1);
let width = window.innerWidth;
addEventListener('resize', () => { if (window.innerWidth !== width) { width = window.innerWidth; shown(); } });
dark.addEventListener('change', () => choose([...document.querySelectorAll('[role=tab]')]
  .findIndex((tab) => tab.getAttribute('aria-selected') === 'true')));
