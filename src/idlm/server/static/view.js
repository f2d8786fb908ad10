// What the page draws: tokens by source, and the meter of an answer.

export function appendTokens(parent, runs) {
  const scroller = parent.closest("#log, .text");
  const atEnd = scroller.scrollTop + scroller.clientHeight >= scroller.scrollHeight - 40;
  for (const { text, source } of runs) {
    const token = document.createElement("span");
    token.className = `token ${source}`;
    token.textContent = text;
    parent.append(token);
  }
  if (atEnd) scroller.scrollTop = scroller.scrollHeight;
}

export function speed(details) {
  return details.seconds > 0 ? details.tokens / details.seconds : 0;
}

export function drawMeter(meter, details) {
  const figures = [
    [details.tokens, "tokens"],
    [speed(details).toFixed(1), "tokens/s"],
    [(details.tokens / details.forwards).toFixed(2), "tokens per forward"],
  ].map(([value, name]) => {
    const figure = document.createElement("span");
    const strong = document.createElement("strong");
    strong.textContent = value;
    figure.className = "figure";
    figure.append(strong, ` ${name}`);
    return figure;
  });
  meter.replaceChildren(...figures);
  if (details.reached_by_place.length) meter.append(drawPlaces(details));
}

function drawPlaces({ accepted_by_place: accepted, reached_by_place: reached }) {
  const places = document.createElement("span");
  places.className = "places";
  places.setAttribute("role", "img");
  const shares = reached.map((count, place) => accepted[place] / count);
  const percent = shares.map((share) => `${Math.round(100 * share)}%`);
  places.setAttribute("aria-label", `Drafts accepted by place: ${percent.join(", ")}`);
  places.append("accepted by place");
  shares.forEach((share, place) => {
    const column = document.createElement("span");
    const box = document.createElement("i");
    const bar = document.createElement("b");
    column.className = "place";
    bar.style.height = `${100 * share}%`;
    box.append(bar);
    column.append(box, percent[place]);
    places.append(column);
  });
  return places;
}
