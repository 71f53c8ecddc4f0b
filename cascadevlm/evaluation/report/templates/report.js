"use strict";
(() => {
  const PAGE = 24, LONG = 320;
  const BADGES = [["harmed", "bad"], ["rescued", "good"], ["abstained", ""], ["wrong", "bad"], ["unanswered", "bad"], ["skipped", ""], ["overruled", ""]];
  const { runs, thumbnails, kinds, chosen } = JSON.parse(document.getElementById("data").textContent);
  const find = (selector) => document.querySelector(selector);
  const list = find(".list"), more = find(".more button"), search = find("input"), choice = find("select"), status = find(".status");
  const state = { run: runs[0], kind: "all", shown: 0, matching: [] };

  const make = (tag, className, ...children) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children);  // strings become text, never markup
    return element;
  };
  const count = (number) => number.toLocaleString("en");
  const capital = (word) => word[0].toUpperCase() + word.slice(1);

  function badge(each) {
    const found = BADGES.find(([kind]) => each.kinds.includes(kind));
    if (!each.readable) return make("span", "badge", "Unreadable");
    if (found) return make("span", `badge ${found[1]}`, capital(found[0]));
    return each.truth < 0 ? make("span", "badge", capital(each.by)) : make("span", "badge good", "Right");
  }

  function picture(each, truth) {
    const uri = thumbnails[each.thumbnail];
    if (!uri) return make("div", "picture", "no picture");
    const image = make("img", "picture");
    Object.assign(image, { src: uri, alt: truth ? `Image of: ${truth}` : each.name, width: 112, height: 112, decoding: "async" });
    return image;
  }

  function candidates(each, labels) {
    const items = each.candidates.map(([column, probability]) => {
      const bar = make("i");
      bar.style.width = `${100 * probability}%`;
      const item = make("li", "", bar, make("span", "name", labels[column]));
      if (column === each.truth) item.append(make("span", "tag truth", "truth"));
      if (column === each.label) item.append(make("span", "tag", "final"));
      item.append(make("span", "p", probability.toFixed(2)));
      return item;
    });
    const shown = make("ol", "candidates below", ...items);
    shown.setAttribute("aria-label", "Candidates with the scorer's probability, in the order shown");
    return shown;
  }

  function verdict(said, labels) {
    const answer = said.label >= 0 ? `: ${labels[said.label]}` : "";
    const outside = said.counts ? "" : ", not asked under the policy";
    const block = make("div", "verdict below", make("p", "", `${said.judge} (${said.outcome}${outside})${answer}`));
    if (!said.said) return block;
    const quote = make("blockquote", "", said.said);
    block.append(quote);
    if (said.said.length > LONG || said.said.split("\n").length > 5) {
      const button = make("button", "", "Show all");
      button.type = "button";
      const fold = (folded) => {
        quote.classList.toggle("clamped", folded);
        button.setAttribute("aria-expanded", String(!folded));
        button.textContent = folded ? "Show all" : "Show less";
      };
      button.addEventListener("click", () => fold(!quote.classList.contains("clamped")));
      fold(true);
      block.append(button);
    }
    return block;
  }

  function card(each) {
    const { labels } = state.run;
    const truth = labels[each.truth], final = each.label >= 0 ? labels[each.label] : "no label";  // an unlabelled image has no truth
    const text = make("div", "", badge(each), make("h3", "", truth || final));
    if (each.readable) {
      const by = each.by ? ` by the ${each.by}` : "";
      const sure = each.probability === null ? "" : ` with probability ${each.probability.toFixed(2)}`;
      const named = truth ? each.label === each.truth : each.label >= 0;
      if (truth || named) text.append(make("p", "facts", named ? `Decided${by}${sure}` : `Final label: ${final}${by}${sure}`));
      const why = each.reasons ? each.reasons.map((reason) => `: ${reason}`).join("") : `, entropy ${each.entropy.toFixed(2)}`;
      text.append(make("p", "facts", `${each.kinds.includes("escalated") ? "Escalated" : "Kept"}${why}`));
    }
    if (each.error) text.append(make("p", "facts", each.error));
    if (each.id) text.append(make("p", "facts", `id: ${each.id}`));
    text.append(make("p", "facts", each.name));
    const article = make("article", "case", picture(each, truth), text);
    article.setAttribute("aria-label", truth ? `${truth}, final label: ${final}` : `${each.name}, final label: ${final}`);
    article.tabIndex = -1;
    if (each.candidates.length) {
      article.append(candidates(each, labels));
      if (truth && !each.candidates.some(([column]) => column === each.truth)) {
        article.append(make("p", "facts below", "The truth is not among the candidates."));
      }
    }
    article.append(...each.verdicts.map((said) => verdict(said, labels)));
    return make("li", "", article);
  }

  function showMore() {
    const next = state.matching.slice(state.shown, state.shown + PAGE);
    list.append(...next.map(card));
    state.shown += next.length;
    more.parentElement.hidden = state.shown >= state.matching.length;
    if (!list.querySelector("[tabindex='0']") && list.firstChild) list.querySelector(".case").tabIndex = 0;
  }

  function sought(each, text) {
    const { labels } = state.run;
    return !text || each.id.toLowerCase().includes(text) || [each.truth, each.label].some((column) => column >= 0 && labels[column].toLowerCase().includes(text));
  }

  function refresh() {
    const { cases, totals } = state.run;
    const text = search.value.trim().toLowerCase();
    const found = cases.filter((each) => sought(each, text));
    for (const button of document.querySelectorAll(".filters button")) {
      const kind = button.dataset.kind;
      button.setAttribute("aria-pressed", String(kind === state.kind));
      button.lastChild.textContent = count(kind === "all" ? found.length : found.filter((each) => each.kinds.includes(kind)).length);
    }
    state.matching = state.kind === "all" ? found : found.filter((each) => each.kinds.includes(state.kind));
    const held = state.kind === "all" ? cases.length : cases.filter((each) => each.kinds.includes(state.kind)).length;
    const sampled = held < totals[state.kind] ? ` This page contains ${count(held)} of ${count(totals[state.kind])} cases, ${chosen}.` : "";
    status.textContent = `${count(state.matching.length)} ${state.matching.length === 1 ? "case" : "cases"}.${sampled}`;
    state.shown = 0;
    list.replaceChildren();
    showMore();
  }

  function move(step) {
    const cards = () => [...list.querySelectorAll(".case")];
    const at = cards().indexOf(document.activeElement.closest(".case"));
    const to = at < 0 ? 0 : at + step;
    if (to >= state.shown) showMore();
    const next = cards()[to];
    if (!next) return;
    list.querySelector("[tabindex='0']").tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
    const onCase = document.activeElement.classList.contains("case");
    const step = { j: 1, k: -1, ...(onCase && { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }) }[event.key];
    if (!step) return;
    event.preventDefault();
    move(step);
  });

  for (const kind of kinds) {
    const button = make("button", "", capital(kind), make("span"));
    button.type = "button";
    button.dataset.kind = kind;
    button.addEventListener("click", () => { state.kind = kind; refresh(); });
    find(".filters").append(button);
  }
  for (const [number, run] of runs.entries()) choice.append(new Option(run.name, String(number)));
  choice.parentElement.hidden = runs.length === 1;
  choice.addEventListener("change", () => { state.run = runs[Number(choice.value)]; refresh(); });
  search.addEventListener("input", refresh);
  more.addEventListener("click", showMore);
  refresh();
})();
