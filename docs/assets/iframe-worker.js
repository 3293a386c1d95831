// The search runs in a worker, and from a folder (file:) browsers let no page start one. There a frame without a size
// plays it: it loads the same script, and messages go to and fro. Served by a server, nothing here is used.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      // Until the script is there, messages would get lost.
      this.loaded = new Promise(resolve => frame.addEventListener("load", resolve, { once: true }))
      frame.srcdoc = `<script>
        var __index = parent.__index
        postMessage = message => parent.postMessage(message, "*")
        importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise((resolve, reject) => {
          const script = document.createElement("script")
          Object.assign(script, { src: url, onload: resolve, onerror: reject })
          document.body.appendChild(script)
        })), Promise.resolve())
      </script><script src="${new URL(url, location)}"></script>`
      document.body.appendChild(frame)
      window.addEventListener("message", event => {
        if (event.source !== frame.contentWindow) return
        const found = new MessageEvent("message", { data: event.data })
        this.dispatchEvent(found)
        if (this.onmessage) this.onmessage(found)
      })
      this.frame = frame
    }
    postMessage(message) {
      this.loaded.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data: message })))
    }
    terminate() {
      this.frame.remove()
    }
  }
}
