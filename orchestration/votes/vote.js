// The page of a session of votes: shows a pair, sends a choice, and shows the next pair once the server has it on disk.
"use strict";
const CHOICES = ["1", "2", "0", "s"];
const find = (id) => document.getElementById(id);
const images = { left: find("left"), right: find("right") };
let state = null, isBusy = true, isReady = false;

function show(next) {
  const isNew = state === null || next.position !== state.position;
  state = next;
  const isOver = state.position === null;
  find("progress").max = state.total;
  find("progress").value = state.num_done;
  find("count").textContent = `${state.num_done.toLocaleString("en")} of ${state.total.toLocaleString("en")} pairs are done`;
  find("prompt").textContent = isOver ? "" : state.prompt;
  find("pair").hidden = isOver;
  find("over").hidden = !isOver;
  if (isNew && !isOver) load(state.position);
  else if (isOver) find("finish").focus();
  update();
}

// Nobody votes on an image that is not there yet.
async function load(position) {
  isReady = false;
  update();
  try {
    await Promise.all(Object.entries(images).map(([side, image]) => {
      image.src = `image/${position}/${side === "left" ? 1 : 2}`;
      return image.decode();
    }));
    if (state.position !== position) return;
    isReady = true;
    say("");
    for (const side of [1, 2]) if (position + 1 < state.total) new Image().src = `image/${position + 1}/${side}`;
  } catch {
    if (state.position === position) say("An image could not be loaded: skip this pair, or reload the page.");
  }
  update();
}

function update() {
  const isOver = state === null || state.position === null;
  for (const button of document.querySelectorAll("[data-choice]"))
    button.disabled = isBusy || isOver || (!isReady && button.dataset.choice !== "s");
  find("undo").disabled = isBusy || state === null || !state.can_undo;
  find("finish").disabled = isBusy;
}

const say = (text) => { find("error").textContent = text; };

async function send(path, body) {
  isBusy = true;
  update();
  try {
    const answer = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    if (!answer.ok && answer.status !== 409) throw new Error(String(answer.status));
    isBusy = false;
    say(answer.ok ? "" : "This page was behind: nothing was counted twice.");
    return await answer.json();
  } catch {
    isBusy = false;
    say("The vote was not counted. Is the command still running? Try again.");
    update();
    return null;
  }
}

async function vote(choice) {
  if (isBusy || state === null || state.position === null || (!isReady && choice !== "s")) return;
  const next = await send("vote", { position: state.position, choice });
  if (next) show(next);
}

async function undo() {
  if (isBusy || state === null || !state.can_undo) return;
  const next = await send("undo", {});
  if (next) show(next);
}

async function finish() {
  if (await send("finish", {})) {
    for (const id of ["over", "others", "pair"]) find(id).hidden = true;
    find("ended").hidden = false;
    state = null;
  }
}

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  const key = event.key.toLowerCase();
  if (CHOICES.includes(key)) vote(key);
  else if (key === "u") undo();
  else return;
  event.preventDefault();
});
for (const button of document.querySelectorAll("[data-choice]")) button.addEventListener("click", () => vote(button.dataset.choice));
find("undo").addEventListener("click", undo);
find("finish").addEventListener("click", finish);
fetch("state").then((answer) => answer.json()).then((first) => { isBusy = false; show(first); })
  .catch(() => say("The command does not answer. Is it still running?"));
