// Behaviour of the page's own parts: lists that are clicked, two clips in step, judgements by mouse or keyboard.
(() => {
  const shown = (element) => element.offsetParent !== null;

  // Buttons with data-act trigger an event of that name, with the data of the button and of what it is in.
  window.prismActs = (element, trigger) => {
    element.addEventListener("click", (event) => {
      const button = event.target.closest("[data-act]");
      if (button && element.contains(button)) trigger(button.dataset.act, { ...button.closest("[data-run]")?.dataset });
    });
  };

  // Two clips run in step: one clock, the other one follows; both begin again when the longer one has ended.
  const duet = (stage) => {
    const clips = [...stage.querySelectorAll("video")];
    if (clips.length < 2 || stage.dataset.duet) return;
    stage.dataset.duet = "yes";
    const [button, scrub, speed] = ["button", "input", "select"].map((tag) => stage.querySelector(`.pz-transport ${tag}`));
    let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
    const length = () => Math.max(...clips.map((clip) => clip.duration || 0));
    const clock = () => clips.reduce((a, b) => ((b.duration || 0) > (a.duration || 0) ? b : a));
    const seek = (time) => clips.forEach((clip) => { clip.currentTime = Math.min(time, (clip.duration || time) - 1e-3); });
    const set = (on) => {
      playing = on;
      button.textContent = on ? "Pause" : "Play";
      clips.forEach((clip) => (on && !clip.ended ? clip.play().catch(() => {}) : clip.pause()));
    };
    stage.prismToggle = () => set(!playing);
    button.addEventListener("click", stage.prismToggle);
    scrub.addEventListener("input", () => { set(false); seek((scrub.value / 1000) * length()); });
    speed.addEventListener("change", () => clips.forEach((clip) => { clip.playbackRate = Number(speed.value); }));
    const ready = () => { if (clips.every((clip) => clip.readyState >= 3)) { seek(0); set(playing); } };
    clips.forEach((clip) => clip.addEventListener("canplay", ready, { once: true }));
    clips.forEach((clip) => clip.addEventListener("ended", () => {
      if (playing && clip === clock()) { seek(0); clips.forEach((each) => each.play().catch(() => {})); }
    }));
    const follow = () => {
      if (!stage.isConnected) return;
      const leader = clock();
      for (const clip of clips) {
        const apart = Math.abs(clip.currentTime - leader.currentTime);
        if (clip !== leader && playing && !clip.ended && apart > 0.08 && leader.currentTime < clip.duration) clip.currentTime = leader.currentTime;
      }
      if (playing && length()) scrub.value = (leader.currentTime / length()) * 1000;
      requestAnimationFrame(follow);
    };
    ready();
    follow();
  };

  // A pair to be judged: choices per dimension; `event` is triggered with them once all are made.
  window.prismStage = (element, trigger, watch, event) => {
    let chosen = {}, began = 0, paused = 0, hiddenSince = null, sent = false;
    const stage = () => element.querySelector(".pz-stage");
    const questions = () => [...element.querySelectorAll(".pz-question")];
    const name = (question) => question.dataset.dimension;
    const current = () => questions().find((each) => !(name(each) in chosen));
    const draw = () => {
      const now = current();
      for (const question of questions()) {
        question.classList.toggle("now", question === now && questions().length > 1);
        question.querySelectorAll("[data-choice]").forEach((button) => {
          button.setAttribute("aria-pressed", String(chosen[name(question)] === button.dataset.choice));
        });
      }
      const next = element.querySelector("[data-act=next]");
      if (next) next.disabled = Boolean(now) || sent;
    };
    const begin = () => {
      chosen = {}; sent = false; began = performance.now(); paused = 0; hiddenSince = document.hidden ? began : null;
      if (stage()) { duet(stage()); draw(); }
    };
    const send = () => {
      if (!stage() || current() || sent || !questions().length) return;
      sent = true;
      draw();
      const seconds = (performance.now() - began - paused) / 1000;
      trigger(event, { key: stage().dataset.key, choices: chosen, seconds });
    };
    const choose = (dimension, choice) => {
      if (sent) return;
      chosen = { ...chosen, [dimension]: choice };
      draw();
      if (questions().length === 1) send();
    };
    document.addEventListener("visibilitychange", () => {  // a tab that is not looked at does not count
      const now = performance.now();
      if (document.hidden) hiddenSince = now;
      else if (hiddenSince !== null) { paused += now - Math.max(hiddenSince, began); hiddenSince = null; }
    });
    element.addEventListener("click", (click) => {
      const button = click.target.closest("[data-choice]");
      if (button) choose(name(button.closest(".pz-question")), button.dataset.choice);
      const act = click.target.closest("[data-act]")?.dataset.act;
      if (act === "next") send();
      if (act === "undo") trigger("undo", {});
    });
    document.addEventListener("keydown", (key) => {
      if (!stage() || !shown(element) || key.ctrlKey || key.metaKey || key.altKey) return;
      if (key.target.closest("input:not([type=range]), textarea, select")) return;
      const choice = { ArrowLeft: "left", 1: "left", ArrowDown: "tie", 2: "tie", ArrowRight: "right", 3: "right" }[key.key];
      const now = current();
      if (choice && now) choose(name(now), choice);
      else if (key.key === "ArrowUp") { const done = questions().filter((each) => name(each) in chosen); if (done.length && !sent) { delete chosen[name(done.at(-1))]; draw(); } }
      else if (key.key === "Enter" && questions().length > 1) send();
      else if (key.key === "Backspace" && element.querySelector("[data-act=undo]")) trigger("undo", {});
      else if (key.key === " ") stage().prismToggle?.();
      else return;
      key.preventDefault();
    });
    watch("value", begin);
    begin();
  };
})();
