"""The page of web.py: one document, nothing from elsewhere."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Any modality from any others</title>
<link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; }
  body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 1.5rem auto; padding: 0 1rem; }
  h1 { font-size: 1.35rem; } h2 { font-size: 1.05rem; margin: 1.4rem 0 .5rem; }
  .inputs, .results { display: flex; flex-wrap: wrap; gap: .8rem; align-items: flex-start; }
  .card { border: 1px solid #8886; border-radius: 6px; padding: .6rem; width: 15.5rem; box-sizing: border-box; }
  .card > label, .name { display: block; font-weight: 600; margin-bottom: .3rem; }
  .card input[type=file], .card textarea { width: 100%; box-sizing: border-box; font: inherit; }
  canvas { display: block; width: 14rem; height: 14rem; margin-top: .5rem; touch-action: none; background: #8883; }
  canvas.drawable { cursor: crosshair; }
  .results img { width: 14rem; height: 14rem; object-fit: contain; image-rendering: auto; }
  #sheet { max-width: 100%; border: 1px solid #8886; }
  .row label { margin-right: 1rem; white-space: nowrap; } .row input[type=number] { width: 5.5rem; }
  .hint { opacity: .75; font-size: .87rem; margin: .2rem 0; }
  #error { color: #b00020; font-weight: 600; } @media (prefers-color-scheme: dark) { #error { color: #ff8a90; } }
  button { font: inherit; padding: .25rem .7rem; } #go { font-weight: 600; padding: .4rem 1.4rem; margin-top: .6rem; }
</style>
</head>
<body>
<h1>Any modality from any others</h1>
<h2>Given</h2>
<p class="hint">Fill in what you have. A text that ends with [S_1] may go on. In a picture of codes you can draw where
it shall change; the rest stays.</p>
<div id="inputs" class="inputs"></div>
<h2>To generate</h2>
<div id="targets" class="row"></div>
<h2>Settings</h2>
<div class="row">
  <label>Seed <input id="seed" type="number" value="0" min="0" step="1"></label>
  <label>Samples <input id="samples" type="number" value="1" min="1" max="16" step="1"></label>
  <label>Steps <input id="steps" type="number" min="1" step="1" placeholder="preset"></label>
  <label>Temperature <input id="temperature" type="number" min="0" step="any" placeholder="preset"></label>
  <label>Guidance <input id="guidance" type="number" step="any" placeholder="preset"></label>
</div>
<button id="go">Generate</button>
<p id="status" role="status"></p>
<p id="error" role="alert"></p>
<h2 id="resultsTitle" hidden>Result</h2>
<div id="results" class="results"></div>
<p><img id="sheet" alt="Everything given and generated, a line for every sample" hidden></p>
<script>
"use strict";
const byId = id => document.getElementById(id);
const cards = {};  // by modality: {value(), mask(), set(result)}
const SIDE = 224;

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function fail(text) { byId("error").textContent = text; byId("status").textContent = ""; }

function readUrl(file) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Error("The file " + file.name + " cannot be read."));
    reader.readAsDataURL(file);
  });
}

function textCard(m) {
  const area = element("textarea", {rows: 4, id: "in-" + m.name});
  cards[m.name] = {
    value: () => area.value.trim() ? {text: area.value} : null,
    mask: () => null,
    set: result => { area.value = result.text; },
  };
  return [area];
}

function pictureCard(m) {
  const file = element("input", {type: "file", accept: "image/*,.npy", id: "in-" + m.name});
  const view = element("canvas", {width: SIDE, height: SIDE, hidden: true});
  const mask = element("canvas", {width: SIDE, height: SIDE});
  const clear = element("button", {type: "button", textContent: "Remove", hidden: true});
  const undraw = element("button", {type: "button", textContent: "Undo drawing", hidden: true});
  const hint = element("p", {className: "hint"});
  let value = null, drawn = false, last = null, shown = null;

  function wipe() {
    drawn = false; undraw.hidden = true;
    mask.getContext("2d").clearRect(0, 0, SIDE, SIDE);
    paint();
  }
  function paint() {
    const context = view.getContext("2d");
    context.clearRect(0, 0, SIDE, SIDE);
    if (shown) {  // the centre, as the model gets it
      const side = Math.min(shown.naturalWidth, shown.naturalHeight);
      const left = (shown.naturalWidth - side) / 2, top = (shown.naturalHeight - side) / 2;
      context.drawImage(shown, left, top, side, side, 0, 0, SIDE, SIDE);
    }
    context.globalAlpha = 0.6; context.drawImage(mask, 0, 0); context.globalAlpha = 1;
  }
  function show(url, next) {
    shown = null; value = next; view.hidden = clear.hidden = false; hint.textContent = "";
    view.className = m.edit ? "drawable" : "";
    wipe();
    if (!url) { hint.textContent = "An array, without a preview."; return; }
    const image = new Image();
    image.onload = () => { if (value === next) { shown = image; paint(); } };
    image.onerror = () => { hint.textContent = "No preview of this file."; };
    image.src = url;
  }
  function remove() { value = shown = null; file.value = ""; view.hidden = clear.hidden = true; wipe(); }
  function at(event) {
    const box = view.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width * SIDE, (event.clientY - box.top) / box.height * SIDE];
  }
  function stroke(event) {
    const context = mask.getContext("2d"), [x, y] = at(event);
    context.strokeStyle = "#fff"; context.lineWidth = 22; context.lineCap = "round";
    context.beginPath(); context.moveTo(...(last || [x, y])); context.lineTo(x + 0.01, y); context.stroke();
    last = [x, y]; drawn = true; undraw.hidden = false;
    paint();
  }
  file.onchange = async () => {
    const chosen = file.files[0];
    if (!chosen) return remove();
    try {
      const url = await readUrl(chosen);
      show(chosen.name.endsWith(".npy") ? null : url, {file: url, name: chosen.name});
    } catch (error) { fail(error.message); }
  };
  clear.onclick = remove; undraw.onclick = wipe;
  if (m.edit) {
    view.onpointerdown = event => { view.setPointerCapture(event.pointerId); last = null; stroke(event); };
    view.onpointermove = event => { if (event.buttons) stroke(event); };
  }
  cards[m.name] = {
    value: () => value,
    mask: () => {
      if (!value || !drawn) return null;
      const flat = element("canvas", {width: SIDE, height: SIDE}), context = flat.getContext("2d");
      context.fillStyle = "#000"; context.fillRect(0, 0, SIDE, SIDE); context.drawImage(mask, 0, 0);
      return flat.toDataURL("image/png");
    },
    set: result => { file.value = ""; show(result.picture || null, {codes: result.codes}); },
  };
  return [file, view, hint, clear, undraw];
}

function resultCard(result) {
  const card = element("div", {className: "card"}, element("span", {
    className: "name", textContent: result.name + " (" + (result.sample + 1) + ")"}));
  if (result.picture) card.append(element("img", {src: result.picture, alt: result.name}));
  if (result.text !== undefined) card.append(element("p", {textContent: result.text || "(an empty text)"}));
  if (!result.picture && result.text === undefined)
    card.append(element("p", {className: "hint", textContent: "Codes; the model has no tokenizer that shows them."}));
  if (cards[result.name]) {
    const use = element("button", {type: "button", textContent: "Use as input"});
    use.onclick = () => { cards[result.name].set(result); byId("inputs").scrollIntoView(); };
    card.append(use);
  }
  return card;
}

async function generate() {
  fail("");
  const request = {inputs: {}, edits: {}, settings: {}, targets: []};
  for (const [name, card] of Object.entries(cards)) {
    const value = card.value(), mask = card.mask();
    if (value) request.inputs[name] = value;
    if (mask) request.edits[name] = mask;
  }
  for (const box of byId("targets").querySelectorAll("input:checked")) request.targets.push(box.value);
  request.seed = Number(byId("seed").value); request.samples = Number(byId("samples").value);
  for (const field of ["steps", "temperature", "guidance"])
    if (byId(field).value !== "") request.settings[field] = Number(byId(field).value);
  byId("go").disabled = true;
  byId("status").textContent = "Generating... The first time takes longer, because programs are compiled.";
  try {
    const answer = await fetch("/generate", {
      method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(request)});
    const out = await answer.json();
    if (out.error) return fail(out.error);
    byId("status").textContent = "Done in " + out.seconds.toFixed(1) + " s.";
    byId("results").replaceChildren(...out.results.map(resultCard));
    byId("sheet").src = out.sheet; byId("sheet").hidden = byId("resultsTitle").hidden = false;
  } catch (error) {
    fail("The server does not answer (" + error.message + ").");
  } finally { byId("go").disabled = false; }
}

async function start() {
  const model = await (await fetch("/model")).json();
  if (model.error) return fail(model.error);
  for (const m of model.inputs) {
    if (!m.usable) continue;
    const parts = m.kind === "text" ? textCard(m) : pictureCard(m);
    const label = element("label", {htmlFor: "in-" + m.name, textContent: m.name});
    byId("inputs").append(element("div", {className: "card"}, label, ...parts));
  }
  for (const name of model.outputs)
    byId("targets").append(element("label", {}, element("input", {type: "checkbox", value: name}), " " + name));
  byId("go").onclick = generate;
}
start().catch(error => fail("The page cannot start (" + error.message + ")."));
</script>
</body>
</html>
"""
