// Asking the API. The token lives here, in memory, and nowhere else.

let token = "";

export class Problem extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

export function useToken(text) {
  token = text;
}

async function request(path, body) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const options = { headers, cache: "no-store" };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    headers["Content-Type"] = "application/json";
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Problem(0, "the API does not answer");
  }
  if (answer.ok) return answer;
  let detail = answer.statusText;
  try {
    detail = (await answer.json()).detail || detail;
  } catch {
    // Not a problem of the API's own: the status says what there is to say.
  }
  throw new Problem(answer.status, detail);
}

export const json = async (path, body) => (await request(path, body)).json();
export const text = async (path) => (await request(path)).text();
