// What needs no server: copying, searching, keys, light and dark. `cgClicks` tells the server what was clicked.
function cgClicks(element, trigger, name) {
  element.addEventListener("click", (event) => {
    const button = event.target.closest("[data-do]");
    const row = event.target.closest(".cg-row");
    if (row && !button) row.classList.toggle("cg-open"); // a touch shows what can be done with a message
    if (!button || (button.dataset.ask && !confirm(button.dataset.ask))) return;
    if (button.dataset.do === "copy") cgCopy(button);
    else if (button.dataset.do === "theme") cgTheme(!document.body.classList.contains("dark"));
    else trigger(name, { what: button.dataset.do, at: button.dataset.at || "" });
  });
  element.addEventListener("input", (event) => {
    if (!event.target.matches(".cg-search")) return;
    const words = event.target.value.trim().toLowerCase();
    for (const card of element.querySelectorAll(".cg-card")) card.hidden = !card.textContent.toLowerCase().includes(words);
  });
}

function cgTheme(dark) {
  document.body.classList.toggle("dark", dark);
  localStorage.setItem("characterglm-dark", dark ? "1" : "");
}

function cgCopy(button) {
  const message = button.closest(".cg-tools").previousElementSibling.querySelector(".cg-message").cloneNode(true);
  message.querySelector(".cg-name").remove();
  const done = () => { button.classList.add("cg-done"); setTimeout(() => button.classList.remove("cg-done"), 1200); };
  if (navigator.clipboard) navigator.clipboard.writeText(message.textContent).then(done);
  else { // only pages from https or from this machine have a clipboard
    const area = Object.assign(document.createElement("textarea"), { value: message.textContent });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    done();
  }
}

addEventListener("keydown", (event) => {
  const box = event.target.closest && event.target.closest("#box textarea");
  if (event.key === "Escape") {
    const stop = document.querySelector("#stop");
    if (stop && !stop.disabled) stop.click();
  } else if (box && event.key === "ArrowUp" && !box.value) {
    const edit = [...document.querySelectorAll('#log [data-do="edit"]')].pop();
    if (edit) edit.click();
  }
}, true);

setTimeout(() => { // after Gradio has chosen what the system asks for
  const chosen = localStorage.getItem("characterglm-dark");
  if (chosen !== null) cgTheme(chosen === "1");
}, 500);
