// Draws the mask and knows the keys; labels work without it.
"use strict";

const form = document.getElementById("review");
const canvas = document.getElementById("mask");
const pen = canvas.getContext("2d", { willReadFrequently: true });
const overlay = document.getElementById("overlay");
const width = document.getElementById("width");
const problem = document.getElementById("problem");
const MARK = "#ff2020";
const MOST_UNDO = 20;
const undo = [];
let changes = 0; // of the canvas
let said = ""; // last, and as which annotation: after a lost answer the same may be sent again, nothing else
let sayings = 0;
let erasing = false;
let busy = false;
let painted = false; // by this person, and not sent

function say(text) {
  problem.textContent = text;
  problem.hidden = !text;
}

// What the canvas shows, as where runs of equal pixels end: whole copies would take hundreds of megabytes.
function remember() {
  const pixels = new Uint32Array(pen.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
  const runs = [];
  for (let place = 1; place <= pixels.length; place += 1) {
    if (pixels[place] !== pixels[place - 1]) runs.push(place, pixels[place - 1]);
  }
  undo.push(runs);
  if (undo.length > MOST_UNDO) undo.shift();
  changes += 1;
}

function takeBack() {
  const runs = undo.pop();
  if (!runs) return;
  const before = pen.createImageData(canvas.width, canvas.height);
  const pixels = new Uint32Array(before.data.buffer);
  for (let run = 0; run < runs.length; run += 2) pixels.fill(runs[run + 1], runs[run - 2] ?? 0, runs[run]);
  pen.putImageData(before, 0, 0);
  changes += 1;
}

function clear() {
  remember();
  pen.clearRect(0, 0, canvas.width, canvas.height);
}

function choose(eraser) {
  erasing = eraser;
  document.getElementById("brush").setAttribute("aria-pressed", String(!eraser));
  document.getElementById("eraser").setAttribute("aria-pressed", String(eraser));
}

function marked() {
  const pixels = pen.getImageData(0, 0, canvas.width, canvas.height).data;
  for (let place = 3; place < pixels.length; place += 4) if (pixels[place] >= 128) return true;
  return false;
}

// A grey mask as marks on the canvas, beside what is painted until it comes; whether it came.
async function load(address) {
  const before = changes;
  let picture;
  try {
    const answer = await fetch(address);
    if (answer.redirected) throw new Error("you have been logged out");
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    picture = await createImageBitmap(await answer.blob());
  } catch (error) {
    say(`the mask can't be had (${error.message})`);
    return false;
  }
  const marks = new OffscreenCanvas(canvas.width, canvas.height);
  const marker = marks.getContext("2d", { willReadFrequently: true });
  marker.imageSmoothingEnabled = false;
  marker.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const found = marker.getImageData(0, 0, canvas.width, canvas.height);
  for (let place = 0; place < found.data.length; place += 4) {
    const on = found.data[place] >= 128 && found.data[place + 3] >= 128;
    found.data.set([255, 32, 32, on ? 255 : 0], place);
  }
  marker.putImageData(found, 0, 0);
  const untouched = changes === before;
  remember();
  if (untouched) pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(marks, 0, 0);
  if (!marked()) say("that mask marks nothing");
  return true;
}

function point(event) {
  const box = canvas.getBoundingClientRect();
  const scale = canvas.width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * canvas.height / box.height];
}

let last = null;
function draw(event) {
  const [x, y] = point(event);
  pen.globalCompositeOperation = erasing ? "destination-out" : "source-over";
  pen.strokeStyle = MARK;
  pen.lineCap = "round";
  pen.lineJoin = "round";
  pen.lineWidth = Number(width.value) * canvas.width / canvas.getBoundingClientRect().width;
  pen.beginPath();
  pen.moveTo(...last);
  pen.lineTo(x, y);
  pen.stroke();
  pen.globalCompositeOperation = "source-over";
  last = [x, y];
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  canvas.setPointerCapture(event.pointerId);
  remember();
  painted = true;
  last = point(event);
  draw(event);
});
canvas.addEventListener("pointermove", (event) => { if (last) draw(event); });
for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, () => { last = null; });

function toggle() {
  if (!overlay) return;
  if (!overlay.hasAttribute("src")) overlay.src = overlay.dataset.src;
  overlay.hidden = !overlay.hidden;
  document.getElementById("toggle").setAttribute("aria-pressed", String(!overlay.hidden));
}
overlay?.addEventListener("error", () => {
  if (!overlay.hidden) toggle();
  overlay.removeAttribute("src"); // asked for again at the next press
  say("the model gives no heat map now");
});

function post(data) {
  return fetch(form.action, { method: "POST", body: data, redirect: "manual" });
}

function parsed(text) {
  return new DOMParser().parseFromString(text, "text/html");
}

// After a login in another tab the form here is the old session's; whether it is the new one's now.
async function renew() {
  const fresh = parsed(await (await fetch(location)).text()).querySelector("#review [name=csrf]")?.value;
  const old = form.elements.csrf.value;
  form.elements.csrf.value = fresh ?? old;
  return form.elements.csrf.value !== old;
}

async function submit(label) {
  if (busy) return;
  busy = true;
  say("");
  try {
    // Without it, what others marked would be marked no more.
    const came = await standing;
    if (label !== "normal" && !came) throw new Error("the mask that stands did not come; load the page again");
    if (label === "normal" && marked() && !confirm("A normal frame has no mask: what is marked will be lost.")) {
      busy = false;
      return;
    }
    const data = new FormData(form);
    data.set("label", label);
    const saying = JSON.stringify([label, data.get("note"), changes]);
    if (said && saying !== said) sayings += 1;
    said = saying;
    if (sayings) data.set("annotation_id", `${data.get("annotation_id")}-${sayings}`);
    data.set("mask", ""); // none, which is not the one that stands
    if (label !== "normal" && marked()) {
      data.set("mask", await new Promise((done) => canvas.toBlob(done, "image/png")), "mask.png");
    }
    let answer = await post(data);
    if (answer.status === 403 && await renew()) {
      data.set("csrf", form.elements.csrf.value);
      answer = await post(data);
    }
    if (answer.type === "opaqueredirect") { // only what was kept leads on
      painted = false;
      location.assign(form.dataset.next);
      return;
    }
    const page = parsed(await answer.text());
    say(page.querySelector(".error")?.textContent ?? `the server answered ${answer.status}`);
  } catch (error) {
    say(error instanceof TypeError ? `the server can't be reached (${error.message}); try again` : error.message);
  }
  busy = false;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (event.submitter?.name === "label") submit(event.submitter.value);
});

const actions = {
  n: () => submit("normal"),
  a: () => submit("anomalous"),
  u: () => submit("unsure"),
  " ": () => { if (!busy) location.assign(form.dataset.next); }, // an answer under way would be cut off
  o: toggle,
  b: () => choose(false),
  e: () => choose(true),
  z: takeBack,
  c: clear,
  m: async () => { if (form.dataset.aiMask && await load(form.dataset.aiMask)) painted = true; },
};
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input:not([type=range]), textarea");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !(event.key in actions)) return;
  if (event.key === " " && event.target.matches("button")) return; // it presses that
  event.preventDefault();
  if (event.repeat) return; // held down, it would answer for the next frame as well
  actions[event.key]();
});
const buttons = { brush: "b", eraser: "e", undo: "z", clear: "c", "ai-mask": "m", toggle: "o" };
for (const [id, key] of Object.entries(buttons)) {
  document.getElementById(id)?.addEventListener("click", (event) => {
    actions[key]();
    if (event.detail > 0) event.currentTarget.blur(); // so that space goes on to the next frame
  });
}
window.addEventListener("beforeunload", (event) => { if (painted && marked()) event.preventDefault(); });
document.getElementById("tools").disabled = false;
const standing = form.dataset.mask ? load(form.dataset.mask) : Promise.resolve(true);
