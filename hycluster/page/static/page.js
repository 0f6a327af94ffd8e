// Keeps a page fresh, and runs the playground. What comes from the cluster is set as text, or is a page that the
// ingress has rendered, from this origin.
"use strict";

const EVERY_MS = 2000;

function freshen() {
  const parts = [...document.querySelectorAll("[data-live]")];
  const pause = document.getElementById("pause");
  const stale = document.getElementById("stale");
  let paused = false;
  let running = false;

  async function look() {
    if (paused || running || document.hidden) return;
    running = true;
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
      if (!answer.ok && answer.status !== 404) throw new Error(`it answers ${answer.status}`);
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const part of parts) {
        const now = fresh.getElementById(part.id);
        // What somebody is at work in is left alone.
        if (!now || part.contains(document.activeElement) || now.innerHTML === part.innerHTML) continue;
        part.className = now.className;
        part.replaceChildren(...now.childNodes);
      }
      stale.hidden = true;
    } catch (error) {
      stale.textContent = `This page is not fresh: the ingress does not answer (${error.message}).`;
      stale.hidden = false;
    } finally {
      running = false;
    }
  }

  pause.hidden = false;
  pause.addEventListener("click", () => {
    paused = !paused;
    pause.setAttribute("aria-pressed", String(paused));
    look();
  });
  document.addEventListener("visibilitychange", look);
  setInterval(look, EVERY_MS);
}

function playground(form) {
  const chat = document.getElementById("chat");
  const said = document.getElementById("said");
  const field = (name) => document.getElementById(name);
  let messages = [];
  let leaving = null;

  function bubble(role, text) {
    const part = document.createElement("article");
    part.className = `bubble ${role}`;
    const who = document.createElement("h2");
    who.textContent = role === "user" ? "You" : field("model").value;
    const words = document.createElement("div");
    words.className = "words";
    words.textContent = text;
    part.append(who, words);
    chat.append(part);
    part.scrollIntoView({ block: "nearest" });
    return part;
  }

  async function answer(into, signal) {
    const begun = performance.now();
    let first = null, tokens = 0, reason = "", request = "", text = "";
    const got = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      signal,
      body: JSON.stringify({
        model: field("model").value,
        messages,
        max_completion_tokens: Number(field("max_tokens").value),
        temperature: Number(field("temperature").value),
        stream: true,
        stream_options: { include_usage: true },
      }),
    });
    request = got.headers.get("x-request-id") || "";
    if (!got.ok) throw new Error(await problem(got));
    const words = into.querySelector(".words");
    for await (const event of events(got.body)) {
      if (event.error) throw new Error(event.error.message || "the answer broke off");
      request = request || event.id || "";
      tokens = event.usage ? event.usage.completion_tokens : tokens;
      for (const choice of event.choices || []) {
        const more = choice.delta.content || choice.delta.reasoning || choice.delta.reasoning_content || "";
        if (more && first === null) first = performance.now();
        text += choice.delta.content || "";
        words.append(more);
        reason = choice.finish_reason || reason;
      }
    }
    if (first === null) first = performance.now();
    return { text, reason, request, tokens, ttft: (first - begun) / 1000, after: (performance.now() - first) / 1000 };
  }

  function figures(into, got) {
    const line = document.createElement("p");
    line.className = "quiet";
    const rate = got.tokens > 1 && got.after > 0 ? `, ${((got.tokens - 1) / got.after).toFixed(1)} tokens/s` : "";
    const cut = got.reason === "length" ? ", cut off by “most tokens”" : "";
    line.textContent = `first token after ${got.ttft.toFixed(2)} s, ${got.tokens} tokens${rate}${cut}. `;
    if (got.request) {
      const why = document.createElement("a");
      why.href = `/ui/requests?id=${encodeURIComponent(got.request)}`;
      why.textContent = "Where its time went";
      line.append(why);
    }
    into.append(line);
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (leaving) return;
    const asked = field("prompt").value;
    messages.push({ role: "user", content: asked });
    const mine = bubble("user", asked);
    field("prompt").value = "";
    const part = bubble("assistant", "");
    leaving = new AbortController();
    field("send").disabled = true;
    field("stop").disabled = false;
    said.textContent = "Answering …";
    try {
      const got = await answer(part, leaving.signal);
      messages.push({ role: "assistant", content: got.text });
      figures(part, got);
      // Only now, whole: a reader that is told each token is told nothing.
      said.textContent = "Answered.";
    } catch (error) {
      const stopped = error.name === "AbortError";
      // It is asked no more: the next message would come with it.
      messages.pop();
      const line = document.createElement("p");
      line.className = stopped ? "quiet" : "notice bad";
      line.textContent = stopped ? "Stopped." : error.message;
      part.append(line);
      if (!stopped && !field("prompt").value) field("prompt").value = asked;
      said.textContent = stopped ? "Stopped." : "It failed.";
      mine.classList.add("dropped");
    } finally {
      leaving = null;
      field("send").disabled = false;
      field("stop").disabled = true;
      field("prompt").focus();
    }
  });
  field("stop").addEventListener("click", () => leaving && leaving.abort());
  field("clear").addEventListener("click", () => {
    if (leaving) leaving.abort();
    messages = [];
    chat.replaceChildren();
    said.textContent = "";
    field("prompt").focus();
  });
  field("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
}

async function problem(answer) {
  const text = await answer.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `${answer.status} ${text.slice(0, 300)}`;
  }
}

async function* events(body) {
  const decoder = new TextDecoder();
  let rest = "";
  for (const reader = body.getReader(); ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

freshen();
const form = document.getElementById("play");
if (form) playground(form);
