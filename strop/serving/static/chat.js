"use strict";
// Model text reaches the page through textContent alone: it is never markup.
const find = (id) => document.getElementById(id);
const chats = [[], []]; // the two histories: each checkpoint goes on from its own answers
let controllers = [];
let canPrefer = false;
let key = sessionStorage.getItem("strop-key") || "";

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function tell(message) {
  find("notice").textContent = message;
  find("notice").hidden = !message;
}

async function ask(path, body, signal) {
  for (;;) {
    const headers = { "Content-Type": "application/json" };
    if (key) headers.Authorization = `Bearer ${key}`;
    const options = body ? { method: "POST", headers, body: JSON.stringify(body), signal } : { headers };
    const response = await fetch(path, options);
    if (response.ok) return response;
    const message = (await response.json().catch(() => ({}))).error?.message || `status ${response.status}`;
    if (response.status !== 401) throw new Error(message);
    await login();
  }
}

function login() {
  const dialog = find("login");
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      key = find("key").value.trim();
      sessionStorage.setItem("strop-key", key);
      resolve();
    }, { once: true });
  });
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the answer broke off");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  return value >= 0.1 ? `${value.toFixed(1)} %` : "< 0.1 %";
}

function shade(logprob) {
  const p = Math.exp(logprob);
  return p > 0.8 ? "token" : p > 0.4 ? "token likely" : p > 0.1 ? "token unsure" : "token odd";
}

// Bytes of one character may lie in several tokens: those are shown as one.
function showTokens(card, pending, entry) {
  pending.bytes.push(...entry.bytes);
  pending.entries.push(entry);
  const text = new TextDecoder().decode(new Uint8Array(pending.bytes));
  if (text.endsWith("\ufffd") && pending.entries.length < 4) return;
  const entries = pending.entries;
  const span = make("span", shade(Math.min(...entries.map((one) => one.logprob))), text);
  span.tabIndex = 0;
  span.title = percent(entries[0].logprob);
  const open = () => {
    card.querySelectorAll(".chosen, table").forEach((one) => one.matches("table") ? one.remove() : one.classList.remove("chosen"));
    span.classList.add("chosen");
    card.append(tableOf(entries[0]));
  };
  span.addEventListener("click", open);
  span.addEventListener("keydown", (event) => event.key === "Enter" && open());
  card.querySelector(".text").append(span);
  pending.bytes = [];
  pending.entries = [];
}

function tableOf(entry) {
  const table = make("table");
  const rows = entry.top_logprobs.some((one) => one.token === entry.token) ? entry.top_logprobs : [...entry.top_logprobs, entry];
  for (const one of rows) {
    const row = make("tr", one.token === entry.token ? "own" : "");
    row.append(make("td", "", JSON.stringify(one.token)), make("td", "", percent(one.logprob)));
    table.append(row);
  }
  return table;
}

async function answer(side, model, card, signal) {
  const system = find("system").value.trim();
  const hasProbabilities = find("probabilities").checked;
  const body = {
    model, stream: true, stream_options: { include_usage: true }, temperature: Number(find("temperature").value),
    max_tokens: Number(find("tokens").value), messages: system ? [{ role: "system", content: system }, ...chats[side]] : chats[side],
  };
  if (hasProbabilities) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  const place = card.querySelector(".text"), started = performance.now(), pending = { bytes: [], entries: [] };
  let text = "", id = "", reason = "", usage = null;
  const response = await ask("/v1/chat/completions", body, signal);
  for await (const event of events(response)) {
    id = event.id;
    usage = event.usage || usage;
    for (const choice of event.choices) {
      text += choice.delta.content || "";
      reason = choice.finish_reason || reason;
      if (!hasProbabilities) place.textContent = text;
      for (const entry of choice.logprobs?.content || []) showTokens(card, pending, entry);
    }
    const chat = find("chat");
    if (chat.scrollHeight - chat.scrollTop - chat.clientHeight < 160) chat.scrollTop = chat.scrollHeight;
  }
  const seconds = (performance.now() - started) / 1000;
  const foot = card.querySelector(".foot");
  foot.append(make("span", "", `${usage.completion_tokens} tokens, ${(usage.completion_tokens / seconds).toFixed(0)} per second`));
  if (reason === "length") foot.append(make("span", "", "cut at the limit"));
  chats[side].push({ role: "assistant", content: text });
  return { id, text };
}

function offerPreference(cards, found) {
  if (!canPrefer || found.length !== 2 || found.some((one) => !one?.text.trim()) || found[0].text === found[1].text) return;
  if (JSON.stringify(chats[0].slice(0, -1)) !== JSON.stringify(chats[1].slice(0, -1))) return; // no longer the same chat
  const buttons = cards.map((card, side) => {
    const button = make("button", "prefer", "Prefer this one");
    button.type = "button";
    button.addEventListener("click", async () => {
      buttons.forEach((one) => { one.disabled = true; });
      try {
        await ask("/preferences", { chosen: found[side].id, rejected: found[1 - side].id });
        card.classList.add("preferred");
        button.textContent = "Preferred";
        buttons[1 - side].remove();
        chats[1 - side] = chats[side].slice(); // both go on from the better answer, and stay comparable
      } catch (error) {
        buttons.forEach((one) => { one.disabled = false; });
        tell(error.message);
      }
    });
    card.querySelector(".foot").append(button);
    return button;
  });
}

async function send(event) {
  event.preventDefault();
  if (controllers.length) {
    controllers.forEach((one) => one.abort());
    return;
  }
  const message = find("message").value;
  if (!message.trim()) return;
  tell("");
  find("empty")?.remove();
  const names = [find("left").value, find("right").value].filter(Boolean);
  find("chat").append(make("div", "turn user text", message));
  const turn = make("div", "turn answers");
  const cards = names.map((name) => {
    const card = make("section", "answer");
    card.append(make("p", "name", name), make("div", "text"), make("div", "foot"));
    turn.append(card);
    return card;
  });
  find("chat").append(turn);
  turn.scrollIntoView({ block: "end" });
  find("message").value = "";
  names.forEach((_, side) => chats[side].push({ role: "user", content: message }));
  controllers = names.map(() => new AbortController());
  find("send").textContent = "Stop";
  const all = await Promise.allSettled(names.map((name, side) => answer(side, name, cards[side], controllers[side].signal)));
  all.forEach((one, side) => {
    if (one.status === "fulfilled") return;
    chats[side].pop(); // a question without its answer would be asked again with the next one
    if (one.reason.name === "AbortError") cards[side].querySelector(".foot").append(make("span", "", "stopped"));
    else tell(one.reason.message);
  });
  offerPreference(cards, all.map((one) => one.value));
  controllers = [];
  find("send").textContent = "Send";
  find("message").focus();
}

function clear() {
  controllers.forEach((one) => one.abort());
  chats[0] = [];
  chats[1] = [];
  find("chat").replaceChildren();
  find("message").focus();
}

async function start() {
  const list = await (await ask("/v1/models")).json();
  canPrefer = list.can_prefer;
  for (const side of ["left", "right"]) {
    const select = find(side);
    if (side === "right") select.append(new Option("nothing", ""));
    for (const model of list.data) {
      const option = new Option(model.id, model.id);
      option.title = `weights ${model.weights_sha256.slice(0, 16)}`;
      select.append(option);
    }
    select.addEventListener("change", clear);
  }
  if (list.data.length > 1) find("right").value = list.data[1].id;
  find("message").focus();
}

find("form").addEventListener("submit", send);
find("clear").addEventListener("click", clear);
find("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
start().catch((error) => tell(error.message));
