"use strict";

const csrf = document.querySelector("meta[name=csrf]").content;
const form = document.getElementById("login");
const error = document.getElementById("error");

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const token = document.getElementById("token");
  const body = { name: document.getElementById("name").value, token: token ? token.value : "" };
  error.hidden = true;
  try {
    const response = await fetch("/login", {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-CSRF-Token": csrf },
      body: JSON.stringify(body),
    });
    if (response.ok) {
      location.replace("/");
      return;
    }
    error.textContent = (await response.json()).error;
  } catch {
    error.textContent = "No connection to the server.";
  }
  error.hidden = false;
});
