"use strict";

// Everything that a model or a person wrote goes into the page through textContent, never as markup.

const $ = (id) => document.getElementById(id);
const csrf = document.querySelector("meta[name=csrf]").content;
const annotator = document.querySelector("meta[name=annotator]").content;
const PENDING = "strop-pending"; // an answer that the server has not confirmed, kept over a reload
const POLL_MS = 10_000;
const MAX_WAIT_MS = 8_000;
const PRESS = matchMedia("(pointer: coarse)").matches ? "Tap" : "Press";

let item = null;
let tiers = []; // place numbers, best tier first: [[2], [0, 3]]
let joins = false; // whether the next answer ties with the last tier
let verdict = "ranked";
let strength = null;
let sending = false;
let poll = null;
let seenMs = 0; // how long this item has been visible
let visibleSince = null;

const isPair = () => item.completions.length === 2;
const nameOf = (place) => (isPair() ? "AB"[place] : String(place + 1));
const ranked = () => tiers.flat();
const unranked = () => item.completions.map((_, place) => place).filter((place) => !ranked().includes(place));

// Talking to the server

function newUuid() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// Sends until the server answers: an answer carries its uuid, so that sending it twice stores it once.
async function send(path, body) {
  for (let wait = 500; ; wait = Math.min(2 * wait, MAX_WAIT_MS)) {
    try {
      const response = await fetch(path, {
        method: "POST",
        headers: { "Content-Type": "application/json", "X-CSRF-Token": csrf },
        body: JSON.stringify(body),
      });
      if (response.status < 500) return response;
    } catch {
      // No connection: the same as a server that fails.
    }
    notify("No connection. Your answer is kept here and sent again until it arrives.", true);
    await sleep(wait);
  }
}

async function post(path, body) {
  if (sending) return;
  sending = true;
  document.body.classList.add("sending");
  localStorage.setItem(PENDING, JSON.stringify({ annotator, path, body }));
  const response = await send(path, body);
  localStorage.removeItem(PENDING);
  sending = false;
  document.body.classList.remove("sending");
  if (response.status === 401) return location.assign("/login");
  const answer = await response.json();
  if (response.ok) {
    notify(path === "/undo" ? "Taken back. You can rank it again." : "");
    show(answer);
  } else {
    notify(answer.error, true);
    if (response.status === 409) await load();
  }
}

async function load() {
  try {
    const response = await fetch("/item");
    if (response.status === 401) return location.assign("/login");
    if (response.ok) return show(await response.json());
  } catch {
    // Tried again below.
  }
  notify("No connection to the server; trying again.", true);
  poll = setTimeout(load, 2_000);
}

async function start() {
  const pending = JSON.parse(localStorage.getItem(PENDING) || "null");
  if (pending && pending.annotator === annotator) await post(pending.path, pending.body);
  if (!item) await load();
}

// Showing an item

function show(state) {
  clearTimeout(poll);
  const { mine, done, wanted } = state.progress;
  $("bar").max = Math.max(wanted, 1);
  $("bar").value = done;
  $("counts").textContent = `${done} of ${wanted} ranked, ${mine} by you`;
  item = state.item;
  $("work").hidden = $("controls").hidden = !item;
  $("empty").hidden = Boolean(item);
  if (!item) {
    poll = setTimeout(load, POLL_MS);
    return;
  }
  if ($("notice").textContent.startsWith("No connection")) notify("");
  tiers = [];
  joins = false;
  verdict = "ranked";
  strength = null;
  seenMs = 0;
  visibleSince = document.hidden ? null : performance.now();
  $("comment").value = "";
  $("commenting").hidden = true;
  $("prompt").replaceChildren(...item.prompt.map(turn));
  $("question").textContent = isPair() ? "Which answer is better?" : "Rank the answers, the best first";
  $("answers").dataset.count = item.completions.length;
  $("answers").replaceChildren(...item.completions.map(card));
  document.querySelectorAll(".clip").forEach(markLong);
  $("expand").hidden = !document.querySelector(".clip.long");
  label($("bad"), "X", isPair() ? "Both bad" : "All bad");
  label($("tie"), "T", "Tie");
  window.scrollTo(0, 0);
  update();
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function label(button, key, text) {
  button.replaceChildren(element("kbd", "", key), ` ${text}`);
}

function turn(message) {
  const made = element("div", `turn clip ${message.role === "assistant" ? "from-assistant" : ""}`);
  if (message.role) made.append(element("p", "role", message.role));
  made.append(prose("text", message.content));
  return made;
}

// The text as it is, character by character; fenced code only gets another typeface.
function prose(className, text) {
  const made = element("div", className);
  made.dir = "auto";
  let inCode = false;
  let run = "";
  const flush = () => {
    if (run) made.append(inCode ? element("code", "", run) : run);
    run = "";
  };
  for (const line of text.split(/(?<=\n)/)) {
    const isFence = line.startsWith("```");
    if (isFence && !inCode) {
      flush();
      inCode = true;
      run = line;
    } else {
      run += line;
      if (isFence) {
        flush();
        inCode = false;
      }
    }
  }
  flush();
  return made;
}

function card(text, place) {
  const made = element("article", "card clip");
  made.dataset.place = place;
  const pick = element("button", "pick");
  pick.type = "button";
  pick.append(element("span", "name", nameOf(place)), element("span", "place"));
  pick.addEventListener("click", () => choose(place));
  const body = prose("text", text);
  body.addEventListener("click", () => {
    if (getSelection().isCollapsed) choose(place); // a drag over the text only selects it
  });
  made.append(pick, body);
  return made;
}

// A long text is cut by the style sheet and gets a button that shows the rest.
function markLong(clip) {
  const text = clip.querySelector(".text");
  if (text.scrollHeight <= text.clientHeight + 8) return;
  clip.classList.add("long");
  const more = element("button", "more", "Show all");
  more.type = "button";
  more.addEventListener("click", () => expand([clip], !clip.classList.contains("open")));
  clip.append(more);
}

function expand(clips, open) {
  for (const clip of clips) {
    clip.classList.toggle("open", open);
    clip.querySelector(".more").textContent = open ? "Show less" : "Show all";
  }
}

function expandAll() {
  const clips = [...document.querySelectorAll(".clip.long")];
  expand(clips, !clips.every((clip) => clip.classList.contains("open")));
}

// Ranking

function choose(place) {
  if (sending || place >= item.completions.length) return;
  verdict = "ranked";
  if (isPair()) {
    const again = tiers.length === 2 && tiers[0][0] === place;
    tiers = again ? [] : [[place], [1 - place]];
    strength = null;
  } else if (ranked().includes(place)) {
    tiers = tiers.map((tier) => tier.filter((one) => one !== place)).filter((tier) => tier.length);
    joins = false;
  } else if (joins && tiers.length) {
    tiers.at(-1).push(place);
    joins = false;
  } else {
    tiers.push([place]);
  }
  update();
}

function tie() {
  verdict = "ranked";
  if (isPair()) {
    tiers = tiers.length === 1 ? [] : [[0, 1]];
    strength = null;
  } else if (tiers.length) {
    joins = !joins;
  }
  update();
}

function allBad() {
  verdict = verdict === "all_bad" ? "ranked" : "all_bad";
  tiers = [];
  joins = false;
  strength = null;
  update();
}

function back() {
  if (tiers.length) {
    tiers.at(-1).pop();
    tiers = isPair() ? [] : tiers.filter((tier) => tier.length);
  }
  joins = false;
  update();
}

function setStrength(value) {
  if (!isPair() || tiers.length !== 2) return;
  strength = strength === value ? null : value;
  update();
}

function submit() {
  if (sending || !item) return;
  if (verdict === "ranked" && !isPair() && unranked().length === 1 && tiers.length) choose(unranked()[0]);
  if (verdict === "ranked" && unranked().length) {
    update(true);
    return;
  }
  answer({ verdict, ranks: verdict === "ranked" ? ranks() : null, strength });
}

const ranks = () => item.completions.map((_, place) => 1 + tiers.findIndex((tier) => tier.includes(place)));

function answer(fields) {
  post("/rank", {
    uuid: newUuid(),
    item: item.id,
    comment: $("comment").value.trim(),
    milliseconds: Math.min(Math.round(seenMs + (visibleSince === null ? 0 : performance.now() - visibleSince)), 86400000),
    ...fields,
  });
}

function skip(reason) {
  $("skipping").close();
  answer({ verdict: "skipped", reason });
}

// What the choice looks like

const ORDINALS = ["1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th", "9th"];

function update(asks = false) {
  for (const made of document.querySelectorAll(".card")) {
    const place = Number(made.dataset.place);
    const tier = tiers.findIndex((one) => one.includes(place));
    const words = tier < 0 ? "" : tiers[tier].length > 1 ? `tied ${ORDINALS[tier]}` : ORDINALS[tier];
    const pairWords = tier < 0 ? "" : tiers.length === 1 ? "tie" : tier === 0 ? "better" : "";
    made.querySelector(".place").textContent = verdict === "all_bad" ? "bad" : isPair() ? pairWords : words;
    made.querySelector(".pick").setAttribute("aria-pressed", String(tier >= 0));
    made.dataset.tier = verdict === "all_bad" ? "bad" : tier < 0 ? "" : isPair() && tier === 1 ? "" : Math.min(tier, 4);
  }
  const isTie = isPair() ? tiers.length === 1 : joins;
  $("tie").setAttribute("aria-pressed", String(isTie));
  $("tie").disabled = !isPair() && !tiers.length;
  $("bad").setAttribute("aria-pressed", String(verdict === "all_bad"));
  $("strength").hidden = !(isPair() && tiers.length === 2);
  document.querySelectorAll("[data-strength]").forEach((button) => {
    button.setAttribute("aria-pressed", String(Number(button.dataset.strength) === strength));
  });
  const rest = unranked().length;
  const ready = verdict === "all_bad" || rest === 0 || (!isPair() && rest === 1 && tiers.length > 0);
  $("submit").classList.toggle("ready", ready);
  $("status").textContent = hint(rest);
  $("status").classList.toggle("asks", asks);
}

function hint(rest) {
  if (verdict === "all_bad") return isPair() ? "Both are bad." : "All are bad.";
  if (isPair()) {
    if (rest) return PRESS === "Tap" ? "Tap the better answer." : "Press A or B, T for a tie, X if both are bad.";
    return tiers.length === 1 ? "A tie." : `${nameOf(tiers[0][0])} is better. How much?`;
  }
  const soFar = tiers.map((tier) => tier.map(nameOf).join(" = ")).join(" > ");
  if (!tiers.length) return `${PRESS} ${PRESS === "Tap" ? "" : "the number of "}the best answer, then the next best.`;
  if (!rest) return soFar;
  if (rest === 1) return `${soFar} ${joins ? "=" : ">"} ${nameOf(unranked()[0])}, if you submit now`;
  return `${soFar} ${joins ? "= ?" : "> ?"}`;
}

function notify(text, isBad = false) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
  $("notice").classList.toggle("bad", isBad);
}

// Keys and buttons

const actions = {
  undo: () => post("/undo", { uuid: newUuid() }),
  skip: () => $("skipping").showModal(),
  close: () => $("skipping").close(),
  comment: () => {
    $("commenting").hidden = false;
    $("comment").focus();
  },
  expand: expandAll,
  bad: allBad,
  tie,
  submit,
};

const needsItem = (action) => action !== "undo" && action !== "close";

function act(action) {
  if (!sending && (item || !needsItem(action))) actions[action]();
}

const KEYS = { u: "undo", s: "skip", c: "comment", e: "expand", x: "bad", t: "tie", "=": "tie", enter: "submit" };

document.addEventListener("keydown", (event) => {
  const key = event.key.toLowerCase();
  const inComment = document.activeElement === $("comment");
  if (inComment && (key === "escape" || (key === "enter" && (event.ctrlKey || event.metaKey)))) {
    event.preventDefault();
    $("comment").blur();
    if (key === "enter") act("submit");
    return;
  }
  if (inComment || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if ($("skipping").open) {
    const button = document.querySelectorAll("[data-reason]")[Number(key) - 1];
    if (button) skip(button.dataset.reason);
    return;
  }
  if (key === "enter" && ["A", "TEXTAREA"].includes(document.activeElement.tagName)) return;
  if (key === "enter" && document.activeElement.id === "logout") return;
  const isDigit = /^[1-9]$/.test(key);
  if (KEYS[key]) {
    event.preventDefault(); // so that Enter submits, whatever was clicked before
    act(KEYS[key]);
  } else if (item && isPair() && (key === "a" || key === "b")) {
    choose(key === "a" ? 0 : 1);
  } else if (item && isDigit) {
    if (isPair()) {
      if (Number(key) <= 4) setStrength(Number(key));
    } else {
      choose(Number(key) - 1);
    }
  } else if (item && key === "backspace") {
    event.preventDefault();
    back();
  }
});

document.querySelectorAll("[data-action]").forEach((button) => {
  button.addEventListener("click", () => act(button.dataset.action));
});
document.querySelectorAll("[data-reason]").forEach((button) => {
  button.addEventListener("click", () => skip(button.dataset.reason));
});
document.querySelectorAll("[data-strength]").forEach((button) => {
  button.addEventListener("click", () => setStrength(Number(button.dataset.strength)));
});
$("logout").addEventListener("click", async () => {
  await send("/logout", {});
  location.assign("/login");
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden && visibleSince !== null) {
    seenMs += performance.now() - visibleSince;
    visibleSince = null;
  } else if (!document.hidden && visibleSince === null) {
    visibleSince = performance.now();
  }
});

start();
