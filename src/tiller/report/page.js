"use strict";
// Everything on the page is there without this script; it adds the slider, the copy buttons and the live page.
(() => {
  const root = document.documentElement;
  root.classList.add("js");

  function show(slider) {
    const section = slider.closest("section");
    const stage = slider.value;
    for (const span of section.querySelectorAll(".strip span")) span.classList.toggle("now", span.dataset.stage === stage);
    const words = JSON.parse(slider.dataset.words)[Number(stage)];
    slider.setAttribute("aria-valuetext", words);
    section.querySelector("output").textContent = words;
  }

  function wire(part) {
    for (const slider of part.querySelectorAll("input[type=range]")) {
      slider.addEventListener("input", () => show(slider));
      show(slider);
    }
    for (const button of part.querySelectorAll("button.copy")) {
      const said = button.textContent;
      button.addEventListener("click", async () => {
        const code = document.getElementById(button.dataset.of);
        try {
          await navigator.clipboard.writeText(code.textContent);
          button.textContent = "Copied";
        } catch {
          getSelection().selectAllChildren(code);
          button.textContent = "Selected: press Ctrl-C";
        }
        setTimeout(() => { button.textContent = said; }, 2500);
      });
    }
  }
  wire(document);

  // The live page: sections that have changed are exchanged; scrolling, the slider and what is unfolded stay as they are.
  const every = Number(root.dataset.live || 0);
  if (!every) return;
  const known = new Map();
  for (const part of document.querySelectorAll("[data-part]")) known.set(part.dataset.part, part.outerHTML);
  let last = null;

  function exchange(old, fresh) {
    const slider = old.querySelector("input[type=range]");
    const open = [...old.querySelectorAll("details")].map((one) => one.open);
    const focused = old.contains(document.activeElement) ? document.activeElement.id : "";
    old.replaceWith(fresh);
    fresh.querySelectorAll("details").forEach((one, index) => { one.open = open[index] ?? one.open; });
    const again = fresh.querySelector("input[type=range]");
    if (slider && again && slider.value !== slider.max) again.value = slider.value;
    wire(fresh);
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  }

  async function refresh() {
    const state = document.getElementById("live-state");
    try {
      const answer = await fetch(location.href, { headers: last ? { "If-None-Match": last } : {}, cache: "no-store" });
      if (answer.status === 200) {
        last = answer.headers.get("ETag");
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        const y = scrollY;
        for (const fresh of page.querySelectorAll("[data-part]")) {
          const old = document.querySelector(`[data-part="${CSS.escape(fresh.dataset.part)}"]`);
          const text = fresh.outerHTML;
          if (!old) document.querySelector("main").append(fresh), wire(fresh);
          else if (known.get(fresh.dataset.part) !== text) exchange(old, fresh);
          known.set(fresh.dataset.part, text);
        }
        scrollTo({ top: y, behavior: "instant" });
      }
      if (state) state.textContent = "live";
    } catch {
      if (state) state.textContent = "the server is gone; this is its last page";
    }
  }
  setInterval(refresh, every * 1000);
})();
