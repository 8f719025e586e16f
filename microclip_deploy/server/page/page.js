// The page of `microclip-deploy serve`: photos go to this server, answers are drawn here.
//
//   files -> waiting -> four lanes -> /v1/classify -> gallery, the selected photo, CSV
//
// Names of classes, models and files and all errors are foreign text: they only become textContent.

const LANES = 4; // requests at a time
const THUMBNAIL = 144; // pixels: sharp at the gallery's size on most screens
const LEAST_SIDE = 512; // of the canvas, so that lines on tiny photos stay thin
const MOST_SIDE = 1024; // as the overlays that the server draws
const UNDECODED = "#8a929c"; // what stands for a picture that this browser cannot decode
const AWAY_MS = 2000; // between looks for a server that cannot be reached
const LOADING_MS = 3000; // between looks at a model that is not ready
const RELEASE_MS = 10000; // a browser has begun to save a download by then
const STAGES = ["decode", "preprocess", "queue", "encoder", "cut", "head", "model"];
const PHOTO_NAME = /\.(jpe?g|png|webp|avif|tiff?|bmp|gif|p[bgnp]m|hei[cf]|jxl)$/i;
// A cell that starts like this is a formula to spreadsheet programs, also behind blanks.
const FORMULA = /^[ \u00a0]*[=+\-@\t\r\n＝＋－＠]/;

const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((e) => [e.id, e]));
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

const photos = []; // in the order they came
const waiting = []; // those not yet asked about
let models = []; // as /v1/models tells
let nextLook = 0; // the timer of a look at models that are loading
let selected = null;
let shown = null; // the selected photo on a canvas, with what was drawn of it
let lanes = 0;
let work = new AbortController(); // aborted when the photos are cleared
let way = Promise.resolve(); // what every request waits for: a key, a busy server, one that is away

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children); // texts become text nodes, never markup
  return element;
}

/** Show a text in a paragraph, or hide it where there is none. */
function tell(paragraph, text) {
  paragraph.hidden = !text;
  if (paragraph.textContent !== text) paragraph.textContent = text;
}

// ---------------------------------------------------------------- the server

function headers() {
  const key = sessionStorage.getItem("key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** Let every request wait for a promise. */
function hold(until) {
  way = Promise.all([way, until]);
}

async function wayIsFree() {
  for (let seen; seen !== way; ) await (seen = way);
}

/** Do something once however many ask for it at the same time. */
function shared(action) {
  let running = null;
  return () => (running ??= action().finally(() => (running = null)));
}

const keyGiven = shared(async () => {
  page.keyform.hidden = false;
  const known = sessionStorage.getItem("key");
  tell(page.connection, known ? "The server does not take this API key." : "The server asks for an API key.");
  page.facts.textContent = "";
  page.key.focus();
  await new Promise((done) => page.keyform.addEventListener("submit", done, { once: true }));
  sessionStorage.setItem("key", page.key.value);
  page.key.value = "";
  page.keyform.hidden = true;
  tell(page.connection, "");
  loadModels();
});

const serverIsBack = shared(async () => {
  tell(page.connection, "The server cannot be reached. This page goes on by itself when it is back.");
  do await sleep(AWAY_MS);
  while (!(await loadModels()));
  tell(page.connection, "");
});

/** Ask which models there are; false where the server cannot be reached. */
const loadModels = shared(async () => {
  const sent = headers();
  const response = await fetch("v1/models", { headers: sent }).catch(() => null);
  if (!response) return false;
  const told = await contents(response);
  if (response.status === 401) refuse(sent);
  else if (response.ok) showModels(told.models);
  else tell(page.facts, told.error);
  return true;
});

/** Return the JSON of an answer; what stands between here and the server may answer otherwise. */
async function contents(response) {
  const error = `The server answered with status ${response.status} and without an explanation.`;
  return response.json().catch(() => ({ error }));
}

/** Ask for a key, unless a new one came since that which was sent. */
function refuse(sent) {
  if (sent.Authorization === headers().Authorization) hold(keyGiven());
}

const chosen = () => models[page.model.selectedIndex];

function showModels(told) {
  const before = chosen();
  const same = (m) => m.name === before?.name && m.version === before.version;
  const heir = (m) => m.name === before?.name && m.default;
  models = told;
  page.model.replaceChildren(
    ...models.map((m) => make("option", "", [m.name, m.version, m.state].filter(Boolean).join(" · "))),
  );
  page.model.selectedIndex = models.indexOf(
    models.find(same) ?? models.find(heir) ?? models.find((m) => m.default) ?? models[0],
  );
  page.modellabel.hidden = models.length < 2;
  showFacts();
  if (before?.version && photos.length && !same(chosen() ?? {})) {
    tell(page.change, `The server no longer serves ${before.name}, version ${before.version}. Answers of it stay until you ask again.`);
    showProgress();
  }
  clearTimeout(nextLook);
  if (models.some((m) => m.state === "loading")) nextLook = setTimeout(loadModels, LOADING_MS);
}

function showFacts() {
  const model = chosen();
  page.facts.replaceChildren();
  if (!model) return page.facts.append("The server has no model.");
  const { classes, size, grid, device, version, state } = model;
  page.facts.append(make("bdi", "", model.name));
  if (!classes) return page.facts.append(`: ${state}.`);
  page.facts.append(` tells ${classes.length} classes apart. It sees ${size} × ${size} pixels in ${grid} × ${grid} parts. `);
  page.facts.append(make("span", "soft", `Version ${version}, ${device}, ${state}.`));
}

/** What is asked about a photo. */
function question() {
  const model = chosen();
  // Without a version a restarted server answers with its new one.
  const which = model ? { model: model.name, ...(model.default ? {} : { version: model.version }) } : {};
  const most = Math.min(100000, Math.max(1, Math.trunc(page.topk.value) || 5));
  return new URLSearchParams({ ...which, top_k: most, saliency: "tokens", heads: true }).toString();
}

/** Whether asking again would say something else. */
function stale(photo) {
  if (photo.state === "waiting") return false;
  const version = chosen()?.version ?? photo.answer?.version;
  return photo.state === "failed" || photo.asked !== question() || photo.answer.version !== version;
}

// ---------------------------------------------------------------- asking

function ask(list) {
  for (const photo of list) {
    Object.assign(photo, { state: "waiting", lost: 0 });
    waiting.push(photo);
    showTile(photo);
  }
  while (lanes < LANES && waiting.length) lane();
  if (list.length) tell(page.change, "");
  showProgress();
}

async function lane() {
  lanes += 1;
  for (let photo; (photo = waiting.shift()); ) {
    // The thumbnail is made here so that few full-size pictures are in memory at a time.
    await Promise.all([classify(photo), photo.thumbnail ?? drawThumbnail(photo)]);
    if (photo.signal.aborted) continue;
    showTile(photo);
    showProgress();
    if (photo === selected) showAnswer();
  }
  lanes -= 1;
}

/** Ask until there is an answer or an error about this photo. */
async function classify(photo) {
  while (photo.state === "waiting" && !photo.signal.aborted) {
    await wayIsFree();
    try {
      await photo.file.slice(0, 1).arrayBuffer();
    } catch {
      return fail(photo, "This browser cannot read the file. Was it moved, or is it a folder?");
    }
    try {
      await send(photo, question());
    } catch {
      await lose(photo);
    }
  }
}

async function send(photo, asked) {
  const type = /^image\//.test(photo.file.type) ? photo.file.type : "application/octet-stream";
  const sent = { ...headers(), "Content-Type": type };
  const began = performance.now();
  const response = await fetch(`v1/classify?${asked}`, {
    method: "POST", headers: sent, body: photo.file, signal: photo.signal,
  });
  const told = await contents(response);
  const elapsed = performance.now() - began;
  if (response.status === 401) {
    refuse(sent);
  } else if (response.status === 429 || response.status === 503) {
    hold(serverIsFree(told.error, Number(response.headers.get("Retry-After")) || 1));
  } else if (!response.ok) {
    fail(photo, told.error);
    if (response.status === 404) loadModels();
  } else if (asked === question()) {
    Object.assign(photo, { state: "done", answer: told, asked, elapsed, error: "" });
    if (told.version !== chosen()?.version) loadModels();
  }
}

async function serverIsFree(error, seconds) {
  tell(page.connection, `${error} (asking again in ${seconds} s)`);
  await sleep(1000 * seconds);
  tell(page.connection, "");
}

function fail(photo, error) {
  Object.assign(photo, { state: "failed", answer: null, error });
}

/** A connection ended: is the server away, or does it refuse this photo without a word? */
async function lose(photo) {
  if (photo.signal.aborted) return;
  if (!(await loadModels())) hold(serverIsBack());
  else if ((photo.lost += 1) > 1) {
    fail(photo, "The connection ended before the server answered. Is the file larger than the server takes?");
  }
}

// ---------------------------------------------------------------- photos come in

function add(files) {
  const news = [...files].map(([file, name]) => ({
    file, name, signal: work.signal, tile: newTile(), thumbnail: null, answer: null, error: "",
  }));
  if (!news.length) return;
  page.gallery.append(...news.map((photo) => photo.tile));
  photos.push(...news);
  page.all.hidden = false;
  page.gallery.hidden = photos.length < 2;
  ask(news);
  select(news[0]);
}

const named = (files) => [...files].map((file) => [file, file.name]);

/** Return files with names from what was dropped; folders give the photos inside. */
async function dropped(transfer) {
  // The list of items is emptied when the event is over, so entries are taken first.
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.some((entry) => entry.isDirectory)) return named(transfer.files);
  return (await Promise.all(entries.map(entryFiles))).flat();
}

async function entryFiles(entry) {
  if (entry.isFile) {
    const file = await new Promise((done) => entry.file(done, () => done(null)));
    const isPhoto = file && (file.type.startsWith("image/") || PHOTO_NAME.test(file.name));
    return isPhoto ? [[file, entry.fullPath.slice(1)]] : [];
  }
  const reader = entry.createReader();
  const found = [];
  // A reader gives a hundred entries at a time, and none at the end.
  for (let some = [1]; some.length; ) {
    some = await new Promise((done) => reader.readEntries(done, () => done([])));
    for (const inner of some) found.push(...(await entryFiles(inner)));
  }
  return found;
}

function clear() {
  work.abort();
  work = new AbortController();
  photos.length = waiting.length = 0;
  selected = shown = null;
  page.gallery.replaceChildren();
  page.all.hidden = page.one.hidden = true;
  tell(page.change, "");
  page.files.focus();
}

// ---------------------------------------------------------------- gallery

let tiles = 0;

function newTile() {
  const tile = make("li", "", make("div", "tile"), make("div", "caption"));
  tile.id = `photo-${(tiles += 1)}`;
  tile.setAttribute("role", "option");
  tile.setAttribute("aria-selected", "false");
  return tile;
}

const summary = (photo) => {
  if (photo.state === "failed") return `failed: ${photo.error}`;
  if (photo.state === "waiting") return "waiting";
  const unsure = photo.answer.unknown ? "unknown, best guess " : "";
  return `${unsure}${photo.answer.classes[0].name}, ${photo.answer.classes[0].probability.toFixed(3)}`;
};

function showTile(photo) {
  const [, caption] = photo.tile.children;
  const best = photo.state === "done" ? photo.answer.classes[0] : null;
  const text = best ? best.name : photo.state === "failed" ? "failed" : "…";
  caption.replaceChildren(make("bdi", "", photo.answer?.unknown ? `unknown (${text})` : text));
  if (best) caption.append(make("span", "number", best.probability.toFixed(2)));
  photo.tile.classList.toggle("failed", photo.state === "failed");
  photo.tile.title = photo.name;
  photo.tile.setAttribute("aria-label", `${photo.name}: ${summary(photo)}`);
}

async function drawThumbnail(photo) {
  const [tile] = photo.tile.children;
  photo.thumbnail = tile;
  const bitmap = await createImageBitmap(photo.file).catch(() => null);
  if (!bitmap) return tile.append(photo.name.split(".").pop().slice(0, 5));
  const side = Math.min(bitmap.width, bitmap.height);
  const canvas = newCanvas(THUMBNAIL, THUMBNAIL);
  const [left, top] = [(bitmap.width - side) / 2, (bitmap.height - side) / 2];
  canvas.pen.drawImage(bitmap, left, top, side, side, 0, 0, THUMBNAIL, THUMBNAIL);
  bitmap.close(); // the full-size pixels; garbage collection would come too late
  const image = make("img", "");
  image.alt = "";
  // A few kB of text; nothing has to be revoked.
  image.src = canvas.toDataURL("image/jpeg", 0.8);
  tile.append(image);
}

function showProgress() {
  if (!photos.length) return;
  const count = (state) => photos.filter((photo) => photo.state === state).length;
  const [failed, open] = [count("failed"), count("waiting")];
  const done = photos.length - open;
  const noun = photos.length === 1 ? "photo" : "photos";
  const state = open ? `${done} of ${photos.length} ${noun}` : `${photos.length} ${noun}`;
  page.count.textContent = failed ? `${state}, ${failed} failed` : state;
  Object.assign(page.progress, { max: Math.max(1, photos.length), value: done, hidden: !open });
  const old = photos.filter(stale).length;
  page.again.hidden = !old || open > 0;
  page.again.textContent = `Ask again (${old})`;
  // Said once at the end: a line a photo would drown a screen reader.
  if (!open) tell(page.said, `${page.count.textContent} answered. ${selected ? summary(selected) : ""}`);
}

function select(photo) {
  selected?.tile.setAttribute("aria-selected", "false");
  selected = photo;
  photo.tile.setAttribute("aria-selected", "true");
  photo.tile.scrollIntoView({ block: "nearest" });
  page.gallery.setAttribute("aria-activedescendant", photo.tile.id);
  page.one.hidden = false;
  page.name.textContent = photo.name;
  showAnswer();
  showPicture(photo);
}

function selectByKey(event) {
  const inRow = photos.filter((photo) => photo.tile.offsetTop === photos[0].tile.offsetTop).length;
  const last = photos.length - 1;
  const at = photos.indexOf(selected);
  const next = {
    ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - inRow, ArrowDown: at + inRow, Home: 0, End: last,
  }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  if (next >= 0 && next <= last) select(photos[next]);
}

// ---------------------------------------------------------------- the selected photo: words

function showAnswer() {
  const { answer, error, state } = selected;
  tell(page.trouble, state === "waiting" ? "Waiting for the server …" : error);
  page.answer.hidden = page.time.hidden = !answer;
  page.about.textContent = answer
    ? `${answer.photo.width} × ${answer.photo.height} pixels, answered by ${answer.model}, version ${answer.version}`
    : "";
  if (answer) {
    showBars(page.classes, answer.classes);
    page.unknown.hidden = !answer.unknown;
    page.zeroshot.hidden = answer.classes.every((guess) => guess.adapted);
    showHeads(answer.heads);
    showTiming(answer.timing_ms, selected.elapsed);
  }
  if (shown) shown.layers = {};
  paint();
}

function showBars(list, guesses) {
  list.replaceChildren(...guesses.map(({ name, probability, adapted }) => {
    const label = make("span", "", make("bdi", "", name));
    label.title = name;
    if (adapted === false) label.append(make("span", "mark", "zero-shot"));
    const bar = make("div", "bar", make("i", ""));
    bar.firstChild.style.width = `${100 * probability}%`;
    return make("li", "", label, make("span", "number", probability.toFixed(3)), bar);
  }));
}

function showHeads({ cls, fg }) {
  showBars(page.cls, cls);
  showBars(page.fg, fg);
  const agree = cls[0].name === fg[0].name;
  page.verdict.replaceChildren(
    ...(agree
      ? [make("b", "", "They agree"), ": both say ", make("bdi", "", cls[0].name), "."]
      : [make("b", "", "They disagree"), ": [CLS] says ", make("bdi", "", cls[0].name), ", [FG] says ", make("bdi", "", fg[0].name), "."]),
  );
}

function showTiming(timing, elapsed) {
  // The parts of the model's time stand in its place where the server tells them.
  const left = "encoder" in timing ? "model" : "";
  const parts = STAGES.filter((name) => name in timing && name !== left).map((name) => [name, timing[name]]);
  const inside = parts.reduce((sum, [, ms]) => sum + ms, 0);
  parts.push(["rest", Math.max(0, elapsed - inside)]);
  const whole = parts.reduce((sum, [, ms]) => sum + ms, 0);
  page.total.textContent = `${whole.toFixed(1)} ms, of which ${timing.total.toFixed(1)} ms in the server`;
  page.stages.replaceChildren(...parts.map(([name, ms]) => {
    const part = make("i", name);
    part.style.width = `${(100 * ms) / whole}%`;
    return part;
  }));
  page.legend.replaceChildren(...parts.map(([name, ms]) => {
    const label = name === "rest" ? "network and rest" : name;
    return make("li", "", make("i", name), make("span", "", label), make("b", "number", `${ms.toFixed(1)} ms`));
  }));
}

// ---------------------------------------------------------------- the selected photo: picture

function newCanvas(width, height) {
  const canvas = make("canvas", "");
  Object.assign(canvas, { width, height, pen: canvas.getContext("2d", { willReadFrequently: true }) });
  canvas.pen.imageSmoothingQuality = "high";
  canvas.pen.fillStyle = "#fff"; // what is transparent lies on white, as for the model
  canvas.pen.fillRect(0, 0, width, height);
  return canvas;
}

/** Decode the photo at the canvas's size; grey where this browser cannot decode it. */
async function showPicture(photo) {
  const bitmap = await createImageBitmap(photo.file).catch(() => null);
  if (photo === selected) {
    shown = bitmap ? { photo, picture: fitted(bitmap, bitmap), layers: {} } : { photo, layers: {} };
    paint();
  }
  bitmap?.close();
}

/** Return a canvas of a photo's shape, with the picture or grey. */
function fitted({ width, height }, bitmap) {
  const long = Math.max(width, height);
  const scale = Math.min(MOST_SIDE, Math.max(LEAST_SIDE, long)) / long;
  const canvas = newCanvas(...[width, height].map((side) => Math.max(1, Math.round(side * scale))));
  canvas.pen.fillStyle = UNDECODED;
  if (bitmap) canvas.pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  else canvas.pen.fillRect(0, 0, canvas.width, canvas.height);
  return canvas;
}

function paint() {
  const kind = page.looks.elements.saliency.value;
  const ready = selected && shown?.photo === selected;
  const answer = selected?.answer;
  const picture = ready && (shown.picture ?? (answer && fitted(answer.photo)));
  page.look.hidden = ready && !picture;
  page.undecoded.hidden = !ready || Boolean(shown.picture);
  page.complete.hidden = !answer?.saliency.complete;
  page.scale.hidden = kind !== "attention";
  page.opacity.disabled = kind === "none";
  page.meaning.textContent = answer ? meaning(kind, answer.saliency.tokens) : "";
  page.canvas.hidden = !picture;
  if (!picture) return;
  Object.assign(page.canvas, { width: picture.width, height: picture.height });
  page.canvas.setAttribute("aria-label", `${selected.name}, ${kind === "none" ? "without overlay" : `with ${kind}`}`);
  const pen = page.canvas.getContext("2d");
  pen.drawImage(picture, 0, 0);
  if (!answer || kind === "none") return;
  pen.globalAlpha = page.opacity.value / 100;
  pen.drawImage((shown.layers[kind] ??= LAYERS[kind](picture, answer)), 0, 0);
}

function meaning(kind, { mask, zero }) {
  if (kind === "none") return "";
  if (kind === "mask") return `The mask covers ${percent(mask.reduce((sum, bit) => sum + bit, 0) / mask.length)} of what the model sees. The rest is dimmed.`;
  return `What [FG] is made of, relative to the brightest part. ${percent(zero)} of the weight lies on no part.`;
}

// What follows draws as serving/overlay.py does, with its constants.
const DIMMED = 0.3;
const COLOUR = 0.4;
const GREYED = 0.8;
const HEAT_OPACITY = 0.75;
const LINE = "rgb(255 255 255)";
const HALO = "rgb(20 20 24)";
const INFERNO = [
  [0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85],
  [227, 89, 51], [249, 140, 10], [249, 201, 50], [252, 255, 164],
];
const LAYERS = { mask: maskLayer, attention: attentionLayer };

/** Return left, top, right, bottom of what the tokens cover, in pixels of a canvas. */
function seenBox(canvas, { photo, saliency }) {
  const scales = [canvas.width / photo.width, canvas.height / photo.height];
  return saliency.seen.map((edge, i) => edge * scales[i % 2]);
}

/** Return a copy of a picture after `change` saw each pixel: (pixels, index, column, row). */
function changed(picture, change) {
  const { width, height } = picture;
  const layer = newCanvas(width, height);
  const image = picture.pen.getImageData(0, 0, width, height);
  for (let y = 0, i = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1, i += 4) change(image.data, i, x, y);
  }
  layer.pen.putImageData(image, 0, 0);
  return layer;
}

function maskLayer(picture, answer) {
  const { grid, mask } = answer.saliency.tokens;
  const box = seenBox(picture, answer);
  const within = (cell) => cell >= 0 && cell < grid;
  const inside = (row, column) => within(row) && within(column) && mask[row * grid + column] === 1;
  const cell = (at, axis) => Math.floor(((at - box[axis]) * grid) / (box[axis + 2] - box[axis]));
  const layer = changed(picture, (pixels, i, x, y) => {
    if (inside(cell(y, 1), cell(x, 0))) return;
    const grey = (pixels[i] + pixels[i + 1] + pixels[i + 2]) / 3;
    for (let c = i; c < i + 3; c += 1) pixels[c] = DIMMED * (COLOUR * pixels[c] + (1 - COLOUR) * grey);
  });
  drawBorder(layer, box, grid, inside);
  return layer;
}

/** Draw a light line with a dark halo between the foreground and the rest. */
function drawBorder({ pen, width, height }, box, grid, inside) {
  const line = Math.max(1, Math.floor(Math.min(width, height) / 220));
  const place = (k, axis) => Math.ceil(box[axis] + (k * (box[axis + 2] - box[axis])) / grid);
  const edges = [];
  for (let k = 0; k <= grid; k += 1) {
    for (let j = 0; j < grid; j += 1) {
      const [x, y] = [place(k, 0), place(k, 1)];
      const upright = inside(j, k - 1) !== inside(j, k) && x !== 0 && x !== width;
      const level = inside(k - 1, j) !== inside(k, j) && y !== 0 && y !== height;
      if (upright) edges.push([x, place(j, 1), x, place(j + 1, 1)]);
      if (level) edges.push([place(j, 0), y, place(j + 1, 0), y]);
    }
  }
  // The halo first: the light line then lies on top of it everywhere.
  for (const [margin, colour] of [[2 * line, HALO], [line, LINE]]) {
    pen.fillStyle = colour;
    for (const [left, top, right, bottom] of edges) {
      pen.fillRect(left - margin, top - margin, right - left + 2 * margin, bottom - top + 2 * margin);
    }
  }
}

function attentionLayer(picture, answer) {
  const { grid, attention } = answer.saliency.tokens;
  const [left, top, right, bottom] = seenBox(picture, answer).map(Math.round);
  const columns = cubicTaps(picture.width, left, right, grid);
  const rows = cubicTaps(picture.height, top, bottom, grid);
  const most = Math.max(...attention, 1e-12);
  const heat = attention.map((weight) => byte((255 * weight) / most));
  // Along the rows, then down the columns; both in bytes, which cuts off what overshoots.
  const across = columns.map((taps) => Array.from({ length: grid }, (_, row) =>
    byte(taps.reduce((sum, [column, share]) => sum + share * heat[row * grid + column], 0))));
  return changed(picture, (pixels, i, x, y) => {
    let sum = 0;
    for (const [row, share] of rows[y]) sum += share * across[x][row];
    const level = byte(sum) / 255;
    // The square root lifts middling weights: attention is dominated by a few tokens.
    const share = HEAT_OPACITY * Math.sqrt(level);
    const grey = (GREYED * (pixels[i] + pixels[i + 1] + pixels[i + 2])) / 3;
    for (let c = 0; c < 3; c += 1) pixels[i + c] = share * inferno(level, c) + (1 - share) * grey;
  });
}

const byte = (value) => Math.min(255, Math.max(0, Math.round(value)));

/** Return cells and shares that each pixel is mixed of, as Pillow's bicubic does; browsers differ. */
function cubicTaps(length, begin, end, grid) {
  return Array.from({ length }, (_, at) => {
    const centre = ((at + 0.5 - begin) * grid) / (end - begin) - 0.5;
    const near = [-1, 0, 1, 2].map((step) => Math.floor(centre) + step);
    const cells = at < begin || at >= end ? [] : near.filter((cell) => cell >= 0 && cell < grid);
    const shares = cells.map((cell) => catmullRom(Math.abs(centre - cell)));
    const whole = shares.reduce((sum, share) => sum + share, 0);
    return cells.map((cell, k) => [cell, shares[k] / whole]);
  });
}

function catmullRom(far) {
  if (far >= 2) return 0;
  return far < 1 ? (1.5 * far - 2.5) * far * far + 1 : ((-0.5 * far + 2.5) * far - 4) * far + 2;
}

function inferno(level, channel) {
  const place = level * (INFERNO.length - 1);
  const below = Math.min(INFERNO.length - 2, Math.floor(place));
  const [from, to] = [INFERNO[below][channel], INFERNO[below + 1][channel]];
  return from + (to - from) * (place - below);
}

// ---------------------------------------------------------------- CSV

/** Return a cell that is no formula to a spreadsheet program, quoted where needed. */
function cell(text) {
  const safe = FORMULA.test(text) ? `'${text}` : text;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

function csv() {
  const most = Math.max(...photos.map((photo) => photo.answer?.classes.length ?? 0));
  const ranks = [...Array(most).keys()];
  const header = ranks.flatMap((rank) => [`class_${rank + 1}`, `probability_${rank + 1}`]);
  const rows = photos.map(({ name, answer, error }) => {
    const guesses = ranks.map((rank) => answer?.classes[rank]);
    const told = guesses.flatMap((g) => (g ? [g.name, g.probability.toFixed(6)] : ["", ""]));
    return [name, ...told, answer ? Number(answer.unknown) : "", answer?.model ?? "", answer?.version ?? "", error || (answer ? "" : "no answer yet")];
  });
  const lines = [["file", ...header, "unknown", "model", "version", "error"], ...rows];
  return lines.map((row) => `${row.map(cell).join(",")}\n`).join("");
}

function download() {
  const link = make("a", "");
  link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv;charset=utf-8" }));
  link.download = "microclip.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), RELEASE_MS);
}

// ---------------------------------------------------------------- events

function listen() {
  const askStale = () => ask(photos.filter(stale));
  page.files.addEventListener("change", () => {
    add(named(page.files.files));
    page.files.value = ""; // so that the same file can be chosen again
  });
  document.addEventListener("paste", (event) => add(named(event.clipboardData.files)));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    page.zone.classList.add("over");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) page.zone.classList.remove("over");
  });
  document.addEventListener("drop", async (event) => {
    event.preventDefault();
    page.zone.classList.remove("over");
    add(await dropped(event.dataTransfer));
  });
  page.gallery.addEventListener("click", (event) => {
    const tile = event.target.closest("li");
    if (tile) select(photos.find((photo) => photo.tile === tile));
  });
  page.gallery.addEventListener("keydown", selectByKey);
  page.looks.addEventListener("input", paint);
  page.model.addEventListener("change", () => {
    showFacts();
    askStale();
  });
  page.topk.addEventListener("change", askStale);
  page.again.addEventListener("click", askStale);
  page.csv.addEventListener("click", download);
  page.clear.addEventListener("click", clear);
  for (const form of [page.options, page.looks, page.keyform]) {
    form.addEventListener("submit", (event) => event.preventDefault());
  }
  // Whoever comes back to the tab sees what is served now.
  document.addEventListener("visibilitychange", () => document.hidden || loadModels());
}

listen();
if (!(await loadModels())) hold(serverIsBack());
