// Requests to the service, their limits, and error messages.

export const service = { model: null, token: "", refused: () => {} };

const RETRY_SECONDS = 90; // while the service is starting or busy
const LOST = "The service does not respond. Check that it is running and that this computer is connected.";

// A failed request. `again`: a retry may help. `results`: the error of each file.
export class Trouble extends Error {
  constructor(message, status = 0, results = null) {
    super(message);
    this.status = status;
    this.results = results;
    this.again = status === 0 || status === 401 || status === 429 || status >= 500;
  }
}

const wait = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

export async function ask(path, body) {
  const end = Date.now() + 1000 * RETRY_SECONDS;
  for (;;) {
    const token = service.token;
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    let answer;
    let content;
    try {
      const method = body ? "POST" : "GET";
      answer = await fetch(path, { method, body, headers, credentials: "omit", cache: "no-store" });
      content = await answer.json().catch(() => null);
    } catch {
      throw new Trouble(LOST);
    }
    if (answer.ok && content) return content;
    if ((answer.status === 429 || answer.status === 503) && Date.now() < end) {
      await wait(Math.min(10, Number(answer.headers.get("Retry-After")) || 1));
      continue;
    }
    if (answer.status === 401) service.refused(Boolean(token));
    const message = content?.error ?? `The service answered ${answer.status} ${answer.statusText}.`;
    throw new Trouble(String(message), answer.status, content?.results ?? null);
  }
}

export function form(files) {
  const data = new FormData();
  for (const file of files) data.append("files", file, file.name || "pasted");
  return data;
}

// Returns a limit of the service, or Infinity.
export function limit(name) {
  return service.model?.limits?.[name] ?? Infinity;
}

export async function isDicom(file) {
  if (/\.(dcm|dicom)$/i.test(file.name)) return true;
  return (await file.slice(128, 132).text().catch(() => "")) === "DICM";
}

// Returns groups of at most `most` cards whose files fit into one request.
export function grouped(cards, most) {
  const heaviest = 0.95 * limit("request_bytes");
  const groups = [];
  let weight = Infinity;
  for (const card of cards) {
    if (!groups.length || weight + card.file.size > heaviest || groups.at(-1).length >= most) {
      groups.push([]);
      weight = 0;
    }
    groups.at(-1).push(card);
    weight += card.file.size;
  }
  return groups;
}

export const byName = (a, b) => a.name.localeCompare(b.name, "en", { numeric: true });

// Returns the files of a drop, including those in folders.
export async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const plain = [...transfer.files];
  if (!entries.some((entry) => entry.isDirectory)) return plain;
  const files = [];
  for (const entry of entries) await walk(entry, files);
  return files.sort(byName);
}

async function walk(entry, files) {
  if (entry.name.startsWith(".") && entry.name !== ".") return;
  if (entry.isFile) files.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
  if (!entry.isDirectory) return;
  const reader = entry.createReader();
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // a hundred at a time
    if (!some.length) return;
    for (const one of some) await walk(one, files);
  }
}
