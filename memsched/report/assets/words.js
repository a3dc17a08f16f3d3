// Numbers as words, and elements made of text: nothing from the data ever becomes markup.

const data = JSON.parse(document.getElementById('data').textContent);
const textOf = (number) => data.texts[number];

const grouped = new Intl.NumberFormat('en-US', { maximumFractionDigits: 0 });
const count = (number) => grouped.format(number);
const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? '' : 's'}`;
const bytes = (number) => `${count(number)} B`;

function size(number) {
  for (const [power, unit] of [[4, 'TiB'], [3, 'GiB'], [2, 'MiB'], [1, 'KiB']]) {
    if (number >= 1024 ** power) return `${digits(number / 1024 ** power)} ${unit}`;
  }
  return bytes(number);
}

// Three digits that count, without an exponent; 0 where none of twelve decimals would say more.
function digits(number) {
  const magnitude = Math.abs(number);
  if (magnitude < 1e-12) return '0';
  if (magnitude >= 100) return count(number);
  return number.toFixed(Math.min(12, Math.max(0, 2 - Math.floor(Math.log10(magnitude)))));
}

function seconds(number) {
  const magnitude = Math.abs(number);
  if (magnitude >= 3600) {
    return `${Math.floor(number / 3600)} h ${Math.round((number % 3600) / 60)} min`;
  }
  if (magnitude >= 100) return `${Math.floor(number / 60)} min ${Math.round(number % 60)} s`;
  for (const [scale, unit] of [[1, 's'], [1e-3, 'ms'], [1e-6, 'µs'], [1e-9, 'ns']]) {
    if (magnitude >= scale) return `${digits(number / scale)} ${unit}`;
  }
  return '0 s';
}

const percent = (share) => `${digits(100 * share)} %`;
// A step that reads an array, and when: without a time, in the next pass.
function useText(use) {
  if (use === null) return 'none in this plan';
  const [step, time] = use;
  return `${textOf(step)}, ${time === null ? 'in the next pass' : `at ${seconds(time)}`}`;
}

// Why an array is where it is. Of many that share a row only the first one's reason is known.
function whyText({ arrays }, row, name) {
  const [first, many] = [textOf(arrays.first[row]), arrays.count[row]];
  const whose = name === first ? '' : `Of ${first}, the first of ${count(many)}: `;
  return whose + textOf(arrays.why[row]);
}

const arrow = (lane) => lane.replaceAll('->', ' → ');

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === 'function') made.addEventListener(name, value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

// A name that may break after its dots and underscores. A bdi keeps its letters from turning what
// stands around it.
const named = (name) => element('bdi', {},
  ...name.split(/(?<=[._])/).flatMap((piece) => [piece, element('wbr')]));

// A number that is shown, with what it is exactly.
const figure = (value, shown, attributes = {}) =>
  element('span', { class: 'figure', 'data-value': value, ...attributes }, shown);

const swatch = (color) => {
  const made = element('i', { class: 'swatch', 'aria-hidden': 'true' });
  made.style.background = color;
  return made;
};
