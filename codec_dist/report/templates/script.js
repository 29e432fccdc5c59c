"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");

  // Light or dark: the system's choice, unless the reader has made one.
  const remembered = () => { try { return localStorage.getItem("theme"); } catch { return null; } };
  const remember = (theme) => { try { localStorage.setItem("theme", theme); } catch { /* not kept, then */ } };
  const isDark = () => root.dataset.theme
    ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  if (["light", "dark"].includes(remembered())) root.dataset.theme = remembered();
  const toggle = document.querySelector("button.theme");
  const paint = () => {
    toggle.textContent = isDark() ? "☀" : "☾";
    toggle.setAttribute("aria-label", isDark() ? "Switch to light mode" : "Switch to dark mode");
  };
  toggle.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remember(root.dataset.theme);
    paint();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  paint();

  // Tabs: one panel is in sight; arrows, Home and End move between them.
  for (const list of document.querySelectorAll("[role=tablist]")) {
    const tabs = [...list.querySelectorAll("[role=tab]")];
    const show = (chosen, focus) => {
      for (const tab of tabs) {
        const selected = tab === chosen;
        tab.setAttribute("aria-selected", String(selected));
        tab.tabIndex = selected ? 0 : -1;
        document.getElementById(tab.getAttribute("aria-controls")).hidden = !selected;
      }
      if (focus) chosen.focus();
    };
    tabs.forEach((tab, place) => {
      tab.addEventListener("click", () => show(tab, false));
      tab.addEventListener("keydown", (event) => {
        const goal = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: tabs.length - 1 }[event.key];
        if (goal === undefined) return;
        event.preventDefault();
        show(tabs[(goal + tabs.length) % tabs.length], true);
      });
    });
    // The last layer says most about classes.
    show(tabs[tabs.length - 1], false);
  }

  // Tables that sort by the column whose head is pressed.
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    const key = (row, column) => {
      const cell = row.cells[column];
      const value = cell.dataset.value ?? cell.textContent.trim();
      return value !== "" && !Number.isNaN(Number(value)) ? Number(value) : value;
    };
    const before = (one, other) => {
      if (one === "" || other === "") return one === other ? 0 : one === "" ? 1 : -1;
      return typeof one === "number" && typeof other === "number"
        ? one - other : String(one).localeCompare(String(other), undefined, { numeric: true });
    };
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent.trim();
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const ascending = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
        const rows = [...body.rows].sort((one, other) => {
          const order = before(key(one, column), key(other, column));
          return ascending ? order : -order;
        });
        body.append(...rows);
      });
    });
  }
})();
