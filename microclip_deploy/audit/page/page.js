const ids = [
  "title", "bar", "count", "trouble", "stop", "ask", "photo", "unreadable", "candidates", "neither", "skip",
  "undo", "other", "name", "names", "done", "results", "end", "undolast", "ended", "numbers",
  "sofar", "pause",
];
const page = Object.fromEntries(ids.map((id) => [id, document.getElementById(id)]));
let state = null;
let busy = true; // a key that is pressed before the next photo is seen would answer for it

function make(tag, text) {
  const element = document.createElement(tag);
  element.textContent = text;
  return element;
}

async function ask(path, body) {
  const how = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(path, body === undefined ? {} : how);
  const said = await response.json();
  if (!response.ok) throw new Error(said.error);
  return said;
}

/** Ask the server, show what it says now, and keep keys from answering meanwhile. */
async function change(path, body) {
  if (busy) return;
  await load(() => ask(path, body));
}

async function load(asked) {
  busy = true;
  page.ask.classList.add("busy");
  try {
    state = await asked();
    page.trouble.hidden = true;
    await show();
  } catch (error) {
    const gone = error instanceof TypeError;
    page.trouble.textContent = gone
      ? "The program behind this page has ended. Nothing is lost: run the same command again to go on."
      : error.message;
    page.trouble.hidden = false;
  }
  page.ask.classList.remove("busy");
  busy = false;
}

async function show() {
  const { total, answered, number, sentences } = state;
  page.bar.max = total;
  page.bar.value = answered;
  page.count.textContent = `${answered} of ${total}`;
  page.title.textContent = number === 0 ? "All photos are answered" : "Which class is it?";
  page.done.hidden = number !== 0;
  page.ask.hidden = number === 0;
  page.numbers.hidden = number === 0 || answered === 0;
  page.stop.hidden = !(state.may_stop && number !== 0);
  page.stop.textContent = "You may stop: which model is better is settled. More answers make the numbers more exact.";
  for (const list of [page.results, page.sofar]) {
    list.replaceChildren(...sentences.map((sentence) => make("li", sentence)));
  }
  page.undo.disabled = answered === 0;
  if (number !== 0) await showPhoto();
  else page.end.focus();
}

async function showPhoto() {
  const { number, candidates, next } = state;
  page.neither.lastChild.textContent = candidates.length === 1 ? " another class" : " neither";
  page.candidates.replaceChildren(...candidates.map(candidate));
  page.photo.src = `photo/${number}`;
  page.name.value = "";
  page.name.blur(); // so that keys answer again
  try {
    await page.photo.decode();
    page.unreadable.hidden = true;
    page.photo.hidden = false;
  } catch {
    page.unreadable.hidden = false;
    page.photo.hidden = true;
  }
  if (next !== 0) new Image().src = `photo/${next}`;
}

function candidate(one, place) {
  const button = make("button", "");
  button.type = "button";
  button.append(make("kbd", String(place + 1)), make("bdi", one.name));
  if (one.examples > 0) {
    const examples = make("span", "");
    examples.className = "examples";
    for (let i = 0; i < one.examples; i += 1) {
      const picture = new Image();
      picture.src = `example/${one.class}/${i}`;
      picture.alt = "";
      examples.append(picture);
    }
    button.append(examples);
  }
  button.addEventListener("click", () => answer(one.name));
  const item = make("li", "");
  item.append(button);
  return item;
}

function answer(text) {
  if (state?.number) change("answer", { number: state.number, answer: text });
}

async function end() {
  busy = true;
  await ask("end", {});
  for (const part of [page.ask, page.done, page.numbers, page.stop]) part.hidden = true;
  page.title.textContent = "Done";
  page.ended.hidden = false;
}

const keys = {
  n: () => answer("neither"),
  0: () => answer("neither"),
  s: () => answer("skip"),
  u: () => change("undo", {}),
  backspace: () => change("undo", {}),
  "/": () => page.name.focus(),
};

document.addEventListener("keydown", (event) => {
  if (event.target === page.name) {
    if (event.key === "Escape") page.name.blur();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !page.ended.hidden) return;
  const chosen = state?.candidates[Number(event.key) - 1];
  const act = chosen ? () => answer(chosen.name) : keys[event.key.toLowerCase()];
  if (!act) return;
  event.preventDefault();
  act();
});
page.neither.addEventListener("click", keys.n);
page.skip.addEventListener("click", keys.s);
page.undo.addEventListener("click", keys.u);
page.undolast.addEventListener("click", keys.u);
page.end.addEventListener("click", end);
page.pause.addEventListener("click", end);
page.other.addEventListener("submit", (event) => {
  event.preventDefault();
  if (page.name.value.trim()) answer(page.name.value);
});
page.name.addEventListener("input", async () => {
  const names = await ask(`names?like=${encodeURIComponent(page.name.value)}`);
  page.names.replaceChildren(...names.map((name) => Object.assign(make("option", ""), { value: name })));
});

load(() => ask("state"));
