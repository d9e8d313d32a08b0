// onnxruntime-web and the world's files. Every file is checked against the sum in world.json.

async function get(file) {
  const answer = await fetch(new URL(file.url, import.meta.url), { integrity: file.integrity });
  if (!answer.ok) throw new Error(`${file.url}: ${answer.status} ${answer.statusText}`);
  return answer;
}

/** The address of a checked copy of a file. */
async function copy(file, type) {
  return URL.createObjectURL(new Blob([await (await get(file)).arrayBuffer()], { type }));
}

/** An ONNX file: packed with gzip, all even bytes before all odd ones. */
async function unpacked(file) {
  const stream = (await get(file)).body.pipeThrough(new DecompressionStream("gzip"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const bytes = new Uint8Array(planes.length), half = (planes.length + 1) >> 1;
  for (let i = 0; i < bytes.length; i++) bytes[i] = planes[(i >> 1) + (i & 1 ? half : 0)];
  return bytes;
}

/** Whether to try WebGPU: `backend` "wasm" says no, "webgpu" takes a GPU that is a program, too. */
export async function hasGpu(backend) {
  if (backend === "wasm") return false;
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  const software = adapter?.info?.isFallbackAdapter ?? adapter?.isFallbackAdapter;
  return Boolean(adapter) && (backend === "webgpu" || !software);
}

/** Sessions of the world's graphs, by WebGPU (`gpu`) or by WASM. */
export async function load(about, gpu, say) {
  const files = about.runtime[gpu ? "webgpu" : "wasm"];
  say("the runtime");
  const ort = await import(await copy(files.ort, "text/javascript"));
  ort.env.logLevel = "error"; // that a GPU leaves small things to the processor is no warning
  const threads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmPaths = {
    mjs: await copy(files.glue, "text/javascript"), wasm: await copy(files.wasm, "application/wasm"),
  };
  const sessions = {};
  for (const [name, file] of Object.entries(about.graphs)) {
    say(`the ${name}`);
    const big = gpu && (name === "dynamics" || name === "decoder");
    sessions[name] = await ort.InferenceSession.create(await unpacked(file), {
      executionProviders: [big ? "webgpu" : "wasm"], graphOptimizationLevel: "all",
      // What is remembered of the frames stays where it is computed.
      ...(big && name === "dynamics" ? { preferredOutputLocation: { new_keys: "gpu-buffer", new_values: "gpu-buffer" } } : {}),
    });
  }
  const where = gpu ? "WebGPU" : `WASM, ${threads} thread${threads > 1 ? "s" : ""}`;
  return { Tensor: ort.Tensor, sessions, where };
}
