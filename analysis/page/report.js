// Draws the curves of report.html with uPlot, from the JSON in the page; analysis/report.py says what is in it.
(() => {
  "use strict";

  const data = JSON.parse(document.getElementById("data").textContent);
  const HEIGHT = 280;
  // What Zoom in leaves of the visible part, and how far the arrows go.
  const ZOOM = 0.5, SHIFT = 0.25;

  const shown = data.runs.map(() => true);
  const logarithmic = Object.fromEntries(data.measures.map((measure) => [measure.column, measure.logarithmic]));
  let x = "step";
  let charts = [];

  // Small helpers -----------------------------------------------------------------------------------------------------

  const element = (name, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  };
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const runColor = (index) => color(`run-${index % 10}`);
  const plain = new Intl.NumberFormat("en", { maximumSignificantDigits: 5 });
  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 4 });
  const number = (value) => (Math.abs(value) < 1e6 ? plain : compact).format(value);
  const write = (value) => (value == null ? "unknown" : number(value));
  const writeX = (value) => (x === "tokens" ? compact : plain).format(value);

  // Where steps of a run lie on the chosen axis: between the places that are known.
  function places(run, steps) {
    const known = run.axes.step, there = run.axes[x];
    let right = 1;
    return steps.map((step) => {
      if (x === "step" || known.length < 2) return x === "step" ? step : there[0];
      while (right < known.length - 1 && known[right] < step) right++;
      const share = (step - known[right - 1]) / (known[right] - known[right - 1]);
      return there[right - 1] + Math.min(1, Math.max(0, share)) * (there[right] - there[right - 1]);
    });
  }

  // What all charts share ---------------------------------------------------------------------------------------------

  // Marks the ends, restarts, changes and slow ranks of the runs in a chart.
  function mark(chart, runs) {
    const { ctx, bbox } = chart;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    for (const index of runs) {
      const run = data.runs[index], at = places(run, run.events.map(([, step]) => step));
      ctx.strokeStyle = ctx.fillStyle = chart.series[1].fill ? color("ink") : runColor(index);
      run.events.forEach(([kind], number) => {
        const left = chart.valToPos(at[number], "x", true), bottom = bbox.top + bbox.height, size = 6 * devicePixelRatio;
        ctx.beginPath();
        if (kind === "slow rank") {
          ctx.moveTo(left, bottom - size);
          ctx.lineTo(left - size / 2, bottom);
          ctx.lineTo(left + size / 2, bottom);
          ctx.fill();
        } else {
          ctx.setLineDash([2 * devicePixelRatio, 4 * devicePixelRatio]);
          ctx.moveTo(left, bbox.top);
          ctx.lineTo(left, bottom);
          ctx.stroke();
        }
      });
    }
    ctx.restore();
  }

  // Which values of a logarithmic axis have a label and a line of the grid; the others become null.
  function roundOnes(chart, values) {
    const { min, max } = chart.scales.y, decades = Math.log10(max / min);
    return values.map((value) => {
      const power = Math.floor(Math.log10(value) + 1e-9), digit = Math.round(value / 10 ** power);
      if (decades <= 1) return value;
      if (decades <= 3) return [1, 2, 5].includes(digit) ? value : null;
      return digit === 1 && power % Math.ceil(decades / 8) === 0 ? value : null;
    });
  }

  // Makes a chart in a box. `lines(chart)` are the lines of text beside the cursor: [colour, text].
  function draw(box, runs, series, values, log, lines) {
    const line = { stroke: color("line"), width: 1 };
    const font = "12px system-ui, sans-serif";
    const axis = { stroke: color("ink"), grid: line, ticks: line, font, labelFont: font };
    const filter = log ? roundOnes : (chart, values) => values;
    const tip = element("div", { className: "tip", hidden: true });
    tip.setAttribute("role", "status");
    const options = {
      width: box.clientWidth || 300,
      height: HEIGHT,
      legend: { show: false },
      scales: { x: { time: false }, y: log ? { distr: 3 } : series[0]?.fill ? { range: (u, low, high) => [0, high] } : {} },
      axes: [
        { ...axis, values: (u, places) => places.map(writeX), space: 70, label: data.axes[x], labelSize: 18, size: 32 },
        {
          ...axis,
          filter,
          grid: { ...line, filter },
          ticks: { ...line, filter },
          values: (u, values) => values.map((value) => (value == null ? "" : number(value))),
          size: (u, labels) => 18 + 7 * Math.max(3, ...(labels || []).map((label) => label.length)),
        },
      ],
      series: [{}, ...series],
      cursor: { drag: { x: true, y: true, uni: 20 }, sync: { key: "all", setSeries: false } },
      hooks: {
        draw: [(chart) => mark(chart, runs)],
        setScale: [(chart, scale) => scale === "x" && follow(chart)],
        setCursor: [(chart) => {
          const at = chart.cursor.idx;
          tip.hidden = at == null || chart.cursor.left < 0 || !box.matches(":hover, :focus-within");
          if (tip.hidden) return;
          const rows = lines(chart).map(([stroke, text]) => {
            const swatch = element("span", { className: "swatch" });
            swatch.style.background = stroke;
            return element("div", {}, swatch, text);
          });
          tip.replaceChildren(element("div", {}, `${data.axes[x]} ${writeX(chart.data[0][at])}`), ...rows);
          const later = chart.cursor.left > chart.over.clientWidth / 2;
          tip.style.left = later ? "4px" : "auto";
          tip.style.right = later ? "auto" : "4px";
        }],
      },
    };
    const positive = (column) => column.map((value) => (value <= 0 ? null : value));
    const chart = new uPlot(options, log ? [values[0], ...values.slice(1).map(positive)] : values, box);
    chart.over.append(tip);
    charts.push(chart);
  }

  // All charts show the same part of the runs.
  function follow(leader) {
    const { min, max } = leader.scales.x;
    for (const chart of charts) {
      if (chart !== leader && (chart.scales.x.min !== min || chart.scales.x.max !== max)) {
        chart.setScale("x", { min, max });
      }
    }
  }

  function act(what) {
    const all = charts.map((chart) => chart.data[0]);
    const first = Math.min(...all.map((at) => at[0])), last = Math.max(...all.map((at) => at[at.length - 1]));
    let { min, max } = charts[0].scales.x;
    const width = max - min, middle = (min + max) / 2;
    if (what === "all") {
      // Heights that were chosen by dragging are forgotten, too.
      charts.forEach((chart) => chart.setData(chart.data));
      [min, max] = [first, last];
    } else if (what === "left" || what === "right") {
      const by = what === "left" ? -Math.min(SHIFT * width, min - first) : Math.min(SHIFT * width, last - max);
      [min, max] = [min + by, max + by];
    } else {
      const half = (width / 2) * (what === "in" ? ZOOM : 1 / ZOOM);
      [min, max] = [Math.max(first, middle - half), Math.min(last, middle + half)];
    }
    if (max > min) charts.forEach((chart) => chart.setScale("x", { min, max }));
  }

  // The keys of a chart that has the focus.
  function press(event, box) {
    const chart = charts.find((one) => box.contains(one.root));
    const width = chart.over.clientWidth, steps = { ArrowLeft: -1, ArrowRight: 1 };
    const acts = { "+": "in", "=": "in", "-": "out", 0: "all", Escape: "all" };
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key in steps) {
      const from = chart.cursor.left < 0 ? width / 2 : chart.cursor.left;
      const left = Math.min(width, Math.max(0, from + (steps[event.key] * width) / 100));
      chart.setCursor({ left, top: chart.over.clientHeight / 2 });
    } else if (event.key in acts) {
      act(acts[event.key]);
    } else return;
    event.preventDefault();
  }

  // A figure with a heading and a box that can have the focus.
  function figure(place, heading, unit, ...more) {
    const box = element("div", { className: "plot", tabIndex: 0 });
    box.setAttribute("role", "application");
    box.setAttribute("aria-label", `${heading}, ${unit}: curve. Arrow keys read values, plus and minus zoom, 0 shows all`);
    box.addEventListener("keydown", (event) => press(event, box));
    box.addEventListener("blur", () => charts.find((one) => box.contains(one.root))?.setCursor({ left: -10, top: -10 }));
    const caption = element("figcaption", {}, element("strong", { textContent: heading }));
    caption.append(element("span", { className: "unit", textContent: unit }), ...more);
    place.append(element("figure", {}, caption, box));
    return box;
  }

  // The curves --------------------------------------------------------------------------------------------------------

  const curves = data.measures
    .filter((measure) => data.runs.some((run) => measure.column in run.curves))
    .map((measure) => {
      const log = element("input", { type: "checkbox", checked: measure.logarithmic });
      log.addEventListener("change", () => {
        logarithmic[measure.column] = log.checked;
        drawAll();
      });
      const label = element("label", {}, log, " log");
      log.setAttribute("aria-label", `${measure.title}: logarithmic scale`);
      const place = document.getElementById("curves-drawn");
      return { measure, box: figure(place, measure.title, measure.unit, label) };
    });

  function drawCurves({ measure, box }) {
    const tables = [], series = [], kinds = [];
    const having = data.runs.flatMap((run, index) => (shown[index] && run.curves[measure.column] ? [index] : []));
    // Of many runs, single steps would hide all trends, and their numbers the next chart.
    const many = having.length > 4, pale = many ? 0.1 : 0.3;
    for (const kind of ["each", "trend", "valid"]) {
      for (const index of having) {
        const run = data.runs[index], curve = run.curves[measure.column][kind];
        if (!curve) continue;
        const stroke = runColor(index), alone = curve[0].length === 1;
        const style = {
          each: { stroke, width: measure.noisy ? 1 : 2, alpha: measure.noisy ? pale : 1 },
          trend: { stroke, width: 2 },
          valid: { stroke, width: 1.5, dash: [6, 4] },
        }[kind];
        const points = kind === "valid" || alone ? { show: true, size: 6, fill: stroke } : { show: false };
        series.push({ ...style, points });
        tables.push([places(run, curve[0]), curve[1]]);
        kinds.push({ index, kind });
      }
    }
    const values = tables.length ? uPlot.join(tables) : [[0, 1]];
    const lines = (chart) =>
      having.map((index) => {
        const read = (kind) => {
          const place = kinds.findIndex((one) => one.index === index && one.kind === kind) + 1;
          return place ? write(chart.data[place][chart.cursor.idxs[place]]) : null;
        };
        const each = read("each"), smooth = read("trend"), valid = read("valid");
        const more = (smooth ? `, smoothed ${smooth}` : "") + (valid ? `, validation ${valid}` : "");
        const said = many && smooth ? `smoothed ${smooth}` : each + more;
        return [runColor(index), `${data.runs[index].name}: ${said}`];
      });
    draw(box, having, series, values, logarithmic[measure.column], lines);
  }

  // The time of a step ------------------------------------------------------------------------------------------------

  const parts = data.runs.flatMap((run, index) => {
    if (!run.parts) return [];
    const keys = data.parts.map((name, part) => {
      const swatch = element("span", { className: "swatch" });
      swatch.style.background = `var(--run-${part})`;
      return element("span", { className: "key" }, swatch, name);
    });
    return [{ index, box: figure(document.getElementById("parts"), run.name, "time of a step (ms)", ...keys) }];
  });

  function drawParts({ index, box }) {
    const run = data.runs[index], [steps, ...each] = run.parts;
    const sums = [];
    each.forEach((part, number) => sums.push(part.map((value, at) => (number ? sums[number - 1][at] : 0) + value)));
    // The whole first: each smaller sum covers it as far as it goes.
    const order = each.map((_, number) => number).reverse();
    const series = order.map((number) => ({
      fill: runColor(number), width: 0, points: { show: steps.length === 1, fill: runColor(number) },
    }));
    const values = [places(run, steps), ...order.map((number) => sums[number])];
    const lines = (chart) =>
      order.map((number) => [runColor(number), `${data.parts[number]}: ${write(each[number][chart.cursor.idx])} ms`]);
    draw(box, [index], series, values, false, lines);
  }

  // The page ----------------------------------------------------------------------------------------------------------

  // Draws all charts anew; the part of the runs that they show stays, unless the axis is another.
  function drawAll(sameAxis = true) {
    const before = sameAxis && charts.length ? { ...charts[0].scales.x } : null;
    charts.forEach((chart) => chart.destroy());
    charts = [];
    curves.forEach(drawCurves);
    parts.filter(({ index }) => shown[index]).forEach(drawParts);
    if (before) charts.forEach((chart) => chart.setScale("x", { min: before.min, max: before.max }));
    document.documentElement.dataset.charts = charts.length;
  }

  const select = document.getElementById("x");
  for (const [value, label] of Object.entries(data.axes)) {
    if (data.runs.every((run) => value in run.axes)) select.append(element("option", { value, textContent: label }));
  }
  select.addEventListener("change", () => {
    x = select.value;
    drawAll(false);
  });
  for (const button of document.querySelectorAll("#controls button")) {
    button.addEventListener("click", () => act(button.dataset.do));
  }
  data.runs.forEach((run, index) => {
    const box = element("input", { type: "checkbox", checked: true });
    box.addEventListener("change", () => {
      shown[index] = box.checked;
      drawAll();
    });
    const swatch = element("span", { className: "swatch" });
    swatch.style.background = `var(--run-${index % 10})`;
    document.getElementById("runs").append(element("label", {}, box, swatch, run.name));
  });
  document.getElementById("runs").hidden = data.runs.length === 1;
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll());
  new ResizeObserver(() => {
    for (const chart of charts) {
      const width = chart.root.parentElement.clientWidth;
      if (width !== chart.width) chart.setSize({ width, height: HEIGHT });
    }
  }).observe(document.querySelector("main"));
  drawAll();
})();
