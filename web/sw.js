// Keeps the page and what was visited, so that it all works again without a connection.
//
// Names that change with their content (hashes, ?v=) are taken from the cache first; the page itself
// and the lists of packs, whose names stay, from the network first.
const CACHE = "stratascope-1";
const CHANGING = /(\/|\/index\.html|\/packs\/index\.json|\/pack\.json|\/sw\.js)$/;

// The page names its script, module and style sheet; they were fetched before this worker existed.
async function keepShell() {
  const cache = await caches.open(CACHE);
  const page = await fetch("./", { cache: "no-cache" });
  const names = (await page.clone().text()).match(/\.\/[\w-]+\.(?:js|wasm|css)/g) ?? [];
  await cache.put("./", page);
  await cache.addAll([...new Set(names)]);
}

self.addEventListener("install", (event) => {
  self.skipWaiting();
  event.waitUntil(keepShell());
});
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

async function fresh(request, cache) {
  const response = await fetch(request);
  if (response.ok) await cache.put(request, response.clone()).catch(() => {}); // a full disk must not break the page
  return response;
}

async function answer(request) {
  const cache = await caches.open(CACHE);
  if (CHANGING.test(new URL(request.url).pathname)) {
    try {
      return await fresh(request, cache);
    } catch (error) {
      const kept = await cache.match(request);
      if (kept) return kept;
      throw error;
    }
  }
  return (await cache.match(request)) ?? fresh(request, cache);
}

self.addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && new URL(url).origin === self.location.origin) event.respondWith(answer(event.request));
});
