"use strict";
// Draws the plots of the page from the numbers in it. Colours come from the stylesheet, so that they follow light and dark.
(() => {
  const plots = JSON.parse(document.getElementById("numbers").textContent).plots;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const places = (value) => (Math.abs(value) >= 100 ? 1 : Math.abs(value) >= 1 ? 3 : 4);
  const written = (value) => {
    if (value === null || value === undefined) return "–";
    if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(2);
    return value.toLocaleString("en", { maximumFractionDigits: places(value) });
  };
  const tick = (value) => (value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(0) : value.toLocaleString("en", { maximumFractionDigits: 4 }));

  // Areas lie on top of each other: what is drawn is the sum of a series and all below it, what is said is the series.
  const stacked = (series) => {
    const sums = [];
    return series.map((each) => each.values.map((value, i) => (sums[i] = (sums[i] || 0) + (value || 0))));
  };

  // What the legend says of a step that has no value is the one before it, or else the first; and where no pointer is, the last.
  const known = (values, at) => {
    const until = at === null || at === undefined ? values.length : at + 1;
    return values.slice(0, until).findLast((each) => each !== null) ?? values.find((each) => each !== null) ?? null;
  };

  const draw = (plot, place) => {
    const areas = plot.series.length > 0 && plot.series.every((each) => each.look === "area");
    const values = areas ? stacked(plot.series) : plot.series.map((each) => each.values);
    const shown = values.map((each) => each.map((value) => (value === null ? null : value * plot.factor)));
    const order = plot.series.map((_, i) => i);
    if (areas) order.reverse(); // the tallest first, so that those below are drawn over it
    const series = order.map((index) => {
      const each = plot.series[index];
      const stroke = each.look === "faint" ? colour("--faint") : colour("--c" + (each.colour % 11));
      return {
        label: each.label, stroke, spanGaps: true,
        width: areas ? 0 : each.look === "faint" ? 1 : each.look === "points" ? 1.5 : 2,
        fill: areas ? stroke : undefined,
        dash: each.look === "points" ? [4, 4] : undefined,
        points: { show: each.look === "points" || plot.steps.length === 1, size: 7, fill: stroke, stroke },
        value: (_, __, ___, at) => {
          const value = known(each.values, at);
          return written(value === null ? null : value * plot.factor);
        },
      };
    });
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--grid"), width: 1 }, ticks: { show: false },
      font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif", labelSize: 20, labelGap: 0 };
    const tall = place.classList.contains("tall");
    const narrow = () => place.clientWidth < 500;
    const height = () => (tall ? (narrow() ? 240 : 300) : 190);
    const options = {
      width: place.clientWidth, height: height(),
      scales: { x: { time: false }, y: { range: (_, low, high) => {
        if (low === null || high === null) return [0, 1];
        if (plot.starts_at_zero) return [0, high > 0 ? high * 1.06 : 1];
        const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
        return [low - room < 0 && low >= 0 ? 0 : low - room, high + room];
      } } },
      axes: [
        { ...axis, label: plot.x, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6],
          values: (_, ticks) => ticks.map(tick), space: 60, size: 28 },
        { ...axis, label: plot.y, values: (_, ticks) => ticks.map(tick), size: 46 },
      ],
      series: [{ label: plot.x, value: (_, __, ___, at) => written(known(plot.steps, at)) }, ...series],
      cursor: { drag: { x: true, y: false }, points: { size: 6 } },
      legend: { markers: { width: 0, fill: (u, i) => u.series[i].stroke() } },
    };
    const chart = new uPlot(options, [plot.steps, ...order.map((index) => shown[index])], place);
    chart.root.querySelector("canvas").setAttribute("aria-hidden", "true");
    return { chart, size: () => ({ width: place.clientWidth, height: height() }) };
  };

  let drawn = [];
  const drawAll = () => {
    for (const each of drawn) each.chart.destroy();
    drawn = [];
    for (const plot of plots) {
      const place = document.getElementById(plot.id);
      if (place && plot.steps.length) drawn.push(draw(plot, place));
    }
  };
  drawAll();

  // A table that is wider than its box says so. One that is folded has no width before it is opened.
  const boxes = [...document.querySelectorAll(".wide")];
  const measure = () => boxes.forEach((box) => box.classList.toggle("scrolls", box.scrollWidth > box.clientWidth));
  measure();
  document.addEventListener("toggle", measure, true);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  let waiting = false;
  addEventListener("resize", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      for (const each of drawn) each.chart.setSize(each.size());
      measure();
    });
  });
})();
