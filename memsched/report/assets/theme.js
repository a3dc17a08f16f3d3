// Colours of the style sheet, sharp canvases, and the box that follows the pointer.

const PART_COLORS = ['pinned', 'streamed', 'idle', 'cache', 'features', 'inputs', 'activations',
  'workspace'];
const dark = matchMedia('(prefers-color-scheme: dark)');
const color = (name) =>
  getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// Draws in units of CSS pixels; returns the context and the size.
function prepare(canvas) {
  const { width, height } = canvas.getBoundingClientRect();
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext('2d');
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = '12px system-ui, sans-serif';
  return { context, width, height };
}

const tip = document.getElementById('tip');
const live = document.getElementById('live');

// `told` is a heading, rows of [name, value], and a closing sentence.
function showTip(told, x, y, { aloud = false } = {}) {
  const rows = told.rows.map(([name, value, shade]) =>
    element('div', {}, element('dt', {}, ...(shade ? [swatch(shade)] : []), name),
      element('dd', {}, named(value))));
  tip.replaceChildren(
    element('strong', {}, named(told.title)),
    element('dl', {}, ...rows),
    ...(told.note ? [element('p', {}, told.note)] : []),
  );
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const right = document.documentElement.clientWidth - box.width - 8;
  const left = Math.max(8, Math.min(x + 14, right));
  const below = y + 16;
  const top = below + box.height < window.innerHeight - 8 ? below : y - box.height - 12;
  tip.style.transform = `translate(${left}px, ${Math.max(8, top)}px)`;
  if (aloud) {
    const words = told.rows.map(([name, value]) => `${name} ${value}`).join(', ');
    live.textContent = `${told.title}: ${words}. ${told.note || ''}`;
  }
}

const hideTip = () => { tip.hidden = true; };
addEventListener('scroll', hideTip, { passive: true });
addEventListener('keydown', (event) => { if (event.key === 'Escape') hideTip(); });
