"use strict";

const $ = (id) => document.getElementById(id);
const state = { info: null, image: null, photograph: 0, aligned: null };

// A few colours of matplotlib's "inferno"; between them they are mixed.
const COLOURS = [[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]];

function colour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (COLOURS.length - 1);
  const low = Math.min(Math.floor(at), COLOURS.length - 2);
  return COLOURS[low].map((c, i) => c + (COLOURS[low + 1][i] - c) * (at - low));
}

function say(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

async function call(path, body) {
  const headers = {};
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Error("The service does not answer. Is it still running?");
  }
  const text = await answer.text();
  let made = null;
  try { made = JSON.parse(text); } catch { /* no JSON: a proxy in between, say */ }
  if (answer.ok && made !== null) return made;
  if (answer.status === 401) $("locked").hidden = false;
  const wait = answer.headers.get("Retry-After");
  throw new Error((made && made.error ? made.error : `HTTP ${answer.status}`) + (wait ? ` (in ${wait} s)` : ""));
}

async function introduce() {
  if (state.info) return state.info;
  state.info = await call("info");
  const ranks = state.info.task === "rerank";
  $("locked").hidden = true;
  $("model").textContent = `${state.info.model}, ${state.info.dtype} on ${state.info.device}`;
  $("asked").textContent = ranks ? "Texts, one a line" : "Question";
  $("text").rows = ranks ? 4 : 2;
  $("text").placeholder = ranks ? "a cat on a red sofa\ntwo dogs in the snow" : "What is in the picture?";
  $("ask").textContent = ranks ? "Rank" : "Ask";
  $("title").textContent = ranks ? "Which fits best" : "Answers";
  return state.info;
}

// --- the photograph ----------------------------------------------------------------------------------------------

function take(file) {
  if (!file) return;
  const number = ++state.photograph;
  const reader = new FileReader();
  reader.onload = () => {
    if (number !== state.photograph) return;  // another one has been dropped meanwhile
    const encoded = reader.result.slice(reader.result.indexOf(",") + 1);
    const most = state.info ? state.info.limits.body : Infinity;
    clear();
    if (encoded.length + 2000 > most) return say(`That file is too large: a request may have ${most} bytes.`);
    state.image = encoded;
    $("photo").onerror = () => {
      $("frame").hidden = true;
      $("hint").hidden = false;
      say("This browser cannot show that file; the service may still read it.");
    };
    URL.revokeObjectURL($("photo").src);
    $("photo").src = URL.createObjectURL(file);
    $("photo").alt = `The photograph: ${file.name || "pasted"}`;
    $("drop").classList.add("full");
    $("hint").hidden = true;
    $("frame").hidden = $("other").hidden = false;
    $("text").focus();
  };
  reader.onerror = () => say("That file cannot be read.");
  reader.readAsDataURL(file);
}

function clear() {
  say("");
  $("found").hidden = $("alignment").hidden = true;
  show(null);
}

// --- answers -----------------------------------------------------------------------------------------------------

function bars(rows, choose) {
  $("answers").replaceChildren(...rows.map(({ name, score }) => {
    const item = document.createElement("li");
    const label = document.createElement(choose ? "button" : "span");
    const share = document.createElement("span");
    const bar = document.createElement("span");
    const fill = document.createElement("span");
    label.className = "name";
    label.textContent = name;
    if (choose) {
      label.type = "button";
      label.setAttribute("aria-pressed", "false");
      label.onclick = () => choose(name, label);
    }
    share.className = "share";
    share.textContent = `${(100 * score).toFixed(1)} %`;
    bar.className = "bar";
    fill.style.width = `${100 * score}%`;
    bar.append(fill);
    item.append(label, share, bar);
    return item;
  }));
}

async function ask() {
  await introduce();
  if (!state.image) throw new Error("There is no photograph yet: drop one, paste one, or choose a file.");
  const number = state.photograph;
  const image = state.image;
  const start = performance.now();
  const text = $("text").value.trim();
  clear();
  if (state.info.task === "vqa") {
    const found = await call("vqa", { inputs: { image, question: text }, parameters: { top_k: 5 } });
    if (number !== state.photograph) return;
    bars(found.map((row) => ({ name: row.answer, score: row.score })), null);
    tell(start);
    await align(text, number);
  } else {
    const texts = text.split("\n").map((line) => line.trim()).filter(Boolean);
    const found = await call("rerank", { query: { image }, texts });
    if (number !== state.photograph) return;
    bars(found.map((row) => ({ name: texts[row.index], score: row.score })), (name, button) => {
      for (const other of $("answers").querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
      guarded(() => align(name, state.photograph));
    });
    tell(start);
    $("answers").querySelector("button").setAttribute("aria-pressed", "true");
    await align(texts[found[0].index], number);
  }
}

function tell(start) {
  $("found").hidden = false;
  $("took").textContent = `${Math.round(performance.now() - start)} ms`;
}

// --- words and patches -------------------------------------------------------------------------------------------

let asked = 0;

async function align(text, photograph) {
  const number = ++asked;
  const found = await call("align", { inputs: { image: state.image, text } });
  if (photograph !== state.photograph || number !== asked) return;
  state.aligned = found;
  $("words").replaceChildren(...found.tokens.map((token, n) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = token;
    button.setAttribute("aria-pressed", "false");
    button.onclick = () => show(button.getAttribute("aria-pressed") === "true" ? null : n);
    return button;
  }));
  $("alignment").hidden = false;
  show(null);
}

function show(word) {
  [...$("words").children].forEach((button, n) => button.setAttribute("aria-pressed", n === word));
  $("frame").classList.toggle("mapped", word !== null);
  const canvas = $("heat");
  if (word === null) {
    canvas.width = canvas.width;  // empties it
    return;
  }
  const [height, width] = state.aligned.grid;
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  state.aligned.heatmaps[word].forEach((heat, i) => pixels.data.set([...colour(heat), 200 * heat], 4 * i));
  context.putImageData(pixels, 0, 0);
}

// --- what people do ----------------------------------------------------------------------------------------------

async function guarded(work) {
  $("ask").disabled = true;
  say("");
  try {
    await work();
  } catch (error) {
    say(error.message);
  } finally {
    $("ask").disabled = false;
  }
}

$("file").onchange = () => take($("file").files[0]);
$("form").onsubmit = (event) => {
  event.preventDefault();
  guarded(ask);
};
$("text").onkeydown = (event) => {
  const sends = event.key === "Enter" && !event.shiftKey && (event.ctrlKey || event.metaKey || state.info?.task === "vqa");
  if (sends && !event.isComposing) {
    event.preventDefault();
    if (!$("ask").disabled) $("form").requestSubmit();
  }
};
document.onpaste = (event) => take([...event.clipboardData.files].find((file) => file.type.startsWith("image/")));
document.ondragover = (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
};
document.ondragleave = () => $("drop").classList.remove("over");
document.ondrop = (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
};
$("key").onchange = () => guarded(introduce);
guarded(introduce);
