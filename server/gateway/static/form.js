// What a form asks for: prompt, student, size, NFE and seed. There is one form for each kind of media.

import { byId, make } from "./dom.js";

const LARGEST_SEED = 2n ** 64n - 1n;

/** prefix: of the ids of the form's elements; onStudent hears of the student that is chosen, and of every other choice. */
export class Form {
  constructor(prefix, onStudent) {
    this.prefix = prefix;
    this.onStudent = onStudent;
    this.students = [];
    this.at("student").addEventListener("change", () => this.offerStudent());
    this.at("dice").addEventListener("click", () => this.rollSeed());
  }

  at(id) {
    return byId(this.prefix + id);
  }

  /** Fills in the students there are to choose from. */
  offer(students) {
    this.students = students;
    this.at("student").replaceChildren(...students.map(({ id }) => make("option", { value: id }, id)));
    if (students.length > 0) this.offerStudent();
  }

  get student() {
    return this.students.find(({ id }) => id === this.at("student").value);
  }

  get nfe() {
    return Number(document.querySelector(`input[name=${this.prefix}nfe]:checked`)?.value);
  }

  /** What is asked for. An empty seed is drawn here and now. Throws an Error in words. */
  read() {
    if (!this.student) throw new Error("The server has not said yet what it serves. Try again in a moment.");
    const typed = this.at("seed").value.trim();
    if (!/^\d*$/.test(typed) || BigInt(typed) > LARGEST_SEED) {
      throw new Error(`The seed must be a whole number from 0 to ${LARGEST_SEED}, not “${typed}”.`);
    }
    const seed = typed === "" ? randomSeed() : String(BigInt(typed));
    return { prompt: this.at("prompt").value, model: this.student.id, size: this.at("size").value, nfe: this.nfe, seed };
  }

  /** Brings settings back. Of a student that is no longer served, prompt and seed alone. */
  write({ prompt, model, size, nfe, seed }) {
    this.at("prompt").value = prompt;
    this.at("seed").value = seed;
    if (!this.students.some(({ id }) => id === model)) return;
    this.at("student").value = model;
    this.offerStudent(nfe);
    this.at("size").value = size;
  }

  /** Fills sizes and the NFE ladder with what the chosen student can do; `nfe` is chosen if it is a rung. */
  offerStudent(nfe = this.nfe) {
    const { sizes, nfe: ladder, default_nfe } = this.student;
    this.at("size").replaceChildren(...sizes.map((size) => make("option", { value: size }, size.replace("x", " × "))));
    const chosen = ladder.includes(nfe) ? nfe : default_nfe;
    this.at("ladder").replaceChildren(...ladder.map((rung) => this.rung(rung, rung === chosen)));
    this.at("compare").textContent = `Compare ${ladder.join(", ")} NFE`;
    this.onStudent(this.student);
  }

  rung(nfe, checked) {
    const marks = Array.from({ length: Math.min(nfe, 8) }, () => make("i"));
    return make(
      "label",
      {},
      make("input", { type: "radio", name: `${this.prefix}nfe`, value: nfe, checked }),
      make("span", { className: "rung" }, `${nfe}`, make("span", { className: "marks", "aria-hidden": "true" }, ...marks)),
    );
  }

  rollSeed() {
    this.at("seed").value = randomSeed();
    this.at("seed").dispatchEvent(new Event("input", { bubbles: true }));
  }
}

function randomSeed() {
  return String(crypto.getRandomValues(new Uint32Array(1))[0]);
}
