// Refuses connections to other machines, so that a program that calls home fares as on a machine
// without a network. Node.js loads this before the program.
import net from 'node:net'

const connect = net.Socket.prototype.connect
net.Socket.prototype.connect = function (...args) {
  const options = [args[0]].flat()[0] // of a call that net has put in order, or of a program's own
  const host = typeof options === 'object' ? options.host : typeof args[1] === 'string' ? args[1] : undefined
  if (host && !['127.0.0.1', '::1', 'localhost'].includes(host)) {
    const error = Object.assign(new Error(`connecting to ${host}: there is no network`), { code: 'ENETUNREACH' })
    setImmediate(() => this.destroy(error)) // the caller goes on with the socket first
    return this
  }
  return connect.apply(this, args)
}
