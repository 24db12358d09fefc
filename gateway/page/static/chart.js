// Stacked bars by day, drawn by uPlot, which is loaded with the first chart.

import { h } from './dom.js';

/** Draws `rows`, each with a name and a value for each day, into an empty element, if it is still shown. */
export async function dailyChart(place, days, rows, label, format) {
  const { default: uPlot } = await import('./uPlot.esm.js');
  if (!place.isConnected) return;
  const legend = h('ul', { class: 'legend' }, rows.map(({ name, values }, i) => h('li', {},
    h('span', { class: `swatch series-${i}` }), name, ' ', h('span', { class: 'dim' }, format(values.reduce((a, b) => a + b, 0))))));
  const period = `${days[0]} to ${days.at(-1)}`;
  const canvas = h('div', { class: 'chart', role: 'img', 'aria-label': `${label} by day and model, from ${period}` });
  const note = h('p', { class: 'hint', 'aria-hidden': 'true' }, period);
  place.replaceChildren(legend, canvas, note);
  const colours = [...legend.querySelectorAll('.swatch')].map((swatch) => getComputedStyle(swatch).backgroundColor);
  const style = getComputedStyle(canvas);
  const bars = uPlot.paths.bars({ size: [0.7, 48] });
  // Each series is drawn over the one before: the largest sum first.
  const sums = rows.map((_, at) => days.map((_, day) => rows.slice(0, at + 1).reduce((sum, { values }) => sum + values[day], 0))).reverse();
  const axis = { stroke: style.color, grid: { stroke: style.borderTopColor, width: 1 }, ticks: { show: false }, font: `12px ${style.fontFamily}` };
  const plot = new uPlot({
    width: canvas.clientWidth, height: 220,
    legend: { show: false },
    cursor: { points: { show: false }, drag: { x: false, y: false } },
    scales: { x: { time: false, range: [-0.6, days.length - 0.4] }, y: { range: (_, __, max) => [0, (max || 1) * 1.05] } },
    axes: [
      { ...axis, grid: { show: false }, size: 30, space: 70, incrs: [1, 2, 5, 7, 14, 30, 60], values: (_, at) => at.map((day) => days[day]?.slice(5) ?? '') },
      { ...axis, size: 64, values: (_, values) => values.map((value) => format(value)) },
    ],
    series: [{}, ...sums.map((_, i) => ({ fill: colours[rows.length - 1 - i], stroke: 'transparent', width: 0, paths: bars, points: { show: false } }))],
    hooks: { setCursor: [({ cursor }) => { note.textContent = cursor.idx == null ? period : noteOf(cursor.idx); }] },
  }, [days.map((_, i) => i), ...sums], canvas);
  const noteOf = (day) => `${days[day]}: ${rows.map(({ name, values }) => [name, values[day]]).filter(([, value]) => value)
    .map(([name, value]) => `${name} ${format(value)}`).join(', ') || 'nothing'}`;
  const resize = new ResizeObserver(() => {
    if (!canvas.isConnected) resize.disconnect();
    else plot.setSize({ width: canvas.clientWidth, height: 220 });
  });
  resize.observe(canvas);
}
